#!/usr/bin/env bash
# One job on machines of a Slurm cluster: a Ray cluster is started on them, the job runs, and the cluster goes with it.
#
#   sbatch --nodes=4 --gpus-per-node=1 cluster/slurm.sh job.yaml
#   sbatch --nodes=4 cluster/slurm.sh job.yaml --method full           # what follows the file are flags of finetune
#
# To change: the lines below, and how your machines get a Python that has this package (module load ..., or a path). The
# home directory and the storage of the runs have to be the same place on every machine. Cut off by the limit of time or
# by another job, it goes on where it was once Slurm starts it again, or by the same command.
#SBATCH --job-name=orchestrator
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --output=orchestrator-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail

if [ $# -eq 0 ]; then
  echo "usage: sbatch cluster/slurm.sh JOB.yaml [FLAGS OF FINETUNE]" >&2
  exit 2
fi
# module load python/3.11                       # CHANGE
# source "$HOME/orchestrator/.venv/bin/activate" # CHANGE

port=$((20000 + SLURM_JOB_ID % 10000)) # a machine may be shared with another job of yours
folder=${TMPDIR:-/tmp}/ray-$SLURM_JOB_ID # of each machine; short, since Ray keeps sockets there
cpus=${SLURM_CPUS_PER_TASK:-1}

# Whoever has the token may run anything as you: a file that you alone can read.
umask 077
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=$HOME/.ray-token-$SLURM_JOB_ID
od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH"

ended() {
  rm -f "$RAY_AUTH_TOKEN_PATH"
  # Not `ray stop`: it would end the Ray of every job of yours on the machine.
  local running
  mapfile -t running < <(jobs -p)
  kill "${running[@]}" 2> /dev/null || true
  wait
  srun --overlap --ntasks-per-node=1 rm -rf "$folder" || true
}
trap ended EXIT

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | awk 'NR == 1')
# Its first address: CHANGE where that is not of the network that the machines reach each other by.
address=$(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" hostname --all-ip-addresses | awk '{print $1}')
srun --overlap --ntasks-per-node=1 mkdir -p "$folder/tmp"
export TMPDIR=$folder/tmp # what libraries put there goes with the job
# Cancelled, Ray waits so long before it ends, for the job to write a checkpoint, and no longer: Slurm kills what is left
# after 30 s (KillWait).
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=15
# Each machine's Ray takes its folder with it, since a job that is cancelled can start nothing more there; for three
# seconds, since its processes write into it until the last of them has ended.
# shellcheck disable=SC2016 # each machine expands it
with_folder='trap : TERM; trap "for _ in 1 2 3 4 5 6; do rm -rf \"$0\"; sleep 0.5; done" EXIT; "$@"'
start=(bash -c "$with_folder" "$folder" ray start --block --disable-usage-stats --num-cpus="$cpus" --temp-dir="$folder")

srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" --cpus-per-task="$cpus" \
  "${start[@]}" --head --node-ip-address="$address" --port="$port" --include-dashboard=false &
until (: > "/dev/tcp/$address/$port") 2> /dev/null; do
  kill -0 $! || exit 1 # the head has ended
  sleep 1
done
others=$((SLURM_JOB_NUM_NODES - 1))
if [ "$others" -gt 0 ]; then
  srun --overlap --nodes="$others" --ntasks="$others" --exclude="$head" --cpus-per-task="$cpus" \
    "${start[@]}" --address="$address:$port" &
fi

# The job begins once all machines are there. It runs here, on the first of them.
python - "$address:$port" "$SLURM_JOB_NUM_NODES" << 'END'
import sys, time
import ray

ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
until = time.monotonic() + 300
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[2]):
    if time.monotonic() > until:
        sys.exit("not all machines have joined the Ray cluster after 300 s")
    time.sleep(1)
END
orchestrator finetune "$@" --address "$address:$port" &
job=$!
# Slurm says so 120 s before the end: the job writes a checkpoint and stops. It is given to Slurm once more.
trap 'kill -TERM "$job"; wait "$job" || true; scontrol requeue "$SLURM_JOB_ID"; exit 0' USR1
# Cancelled by you, or by a job that goes first, which Slurm puts back into the queue by itself: it stops.
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"; kill -TERM "$job"; wait "$job"; exit' TERM
wait "$job"
