#!/usr/bin/env bash
# Waits until the cloud says that it takes this spot machine away, and passes that on to Ray, which tells the jobs: they
# write a checkpoint and go on elsewhere. Runs beside a worker for as long as the machine lives:
#
#   RAY_ADDRESS=HEAD:6379 notice aws &        AWS says it 120 s ahead
#   RAY_ADDRESS=HEAD:6379 notice gcp &        Google Cloud says it 30 s ahead
#
# METADATA: another address of the metadata service than the cloud's own, for tests.
set -euo pipefail

cloud=${1:?usage: notice aws|gcp}
every_s=${EVERY_S:-2}

case $cloud in
  aws)
    metadata=${METADATA:-http://169.254.169.254}
    left_s=110
    ;;
  gcp)
    metadata=${METADATA:-http://metadata.google.internal}
    left_s=25
    ;;
  *)
    echo "usage: notice aws|gcp" >&2
    exit 2
    ;;
esac
export RAY_ADDRESS=${RAY_ADDRESS:?the address of the head is wanted, HOST:6379}

is_taken_away() {
  local token
  if [ "$cloud" = aws ]; then
    # 404 until it is: and then what is to happen, and when.
    token=$(curl --silent --fail --max-time 5 --request PUT --header 'X-aws-ec2-metadata-token-ttl-seconds: 300' \
      "$metadata/latest/api/token") || return 1
    curl --silent --fail --max-time 5 --output /dev/null --header "X-aws-ec2-metadata-token: $token" \
      "$metadata/latest/meta-data/spot/instance-action"
  else
    [ "$(curl --silent --fail --max-time 5 --header 'Metadata-Flavor: Google' \
      "$metadata/computeMetadata/v1/instance/preempted")" = TRUE ]
  fi
}

until is_taken_away; do
  sleep "$every_s"
done
echo "this machine is taken away in $left_s s: Ray is told"
# Without an id it drains the node that it runs on.
exec ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "the cloud takes this machine away" \
  --deadline-remaining-seconds "$left_s"
