# A node without GPUs: the head of every cluster, and workers on CPUs. From the root of this repository:
#
#   docker build -f cluster/docker/cpu.Dockerfile -t REGISTRY/orchestrator:0.1.0-cpu .
#   docker push REGISTRY/orchestrator:0.1.0-cpu
#
# To change: REGISTRY, here and in the files that name the image. Python has to be the laptop's, to the minor version.
FROM python:3.11-slim-bookworm

# wget: KubeRay's probes ask with it. rsync, ssh, sudo: the head of a `ray up` cluster reaches its workers with them.
RUN apt-get update \
    && apt-get install -y --no-install-recommends curl openssh-client procps rsync sudo wget \
    && rm -rf /var/lib/apt/lists/*

# Builds of torch without CUDA: 0.2 GB instead of 3.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /opt/orchestrator
COPY cluster/docker/requirements.txt ./
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" -r requirements.txt

COPY pyproject.toml README.md LICENSE ./
COPY orchestrator orchestrator
COPY plugins plugins
RUN pip install --no-cache-dir --no-deps .
COPY --chmod=755 cluster/vms/notice.sh /usr/local/bin/notice

# Not root: what a job runs is somebody's code. 1000 is the user of most machine images, whose files are mounted.
RUN useradd --create-home --uid 1000 --shell /bin/bash ray
USER ray
WORKDIR /home/ray
