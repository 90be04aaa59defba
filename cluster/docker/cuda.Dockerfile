# A node with NVIDIA GPUs. From the root of this repository:
#
#   docker build -f cluster/docker/cuda.Dockerfile -t REGISTRY/orchestrator:0.1.0-cuda .
#   docker push REGISTRY/orchestrator:0.1.0-cuda
#
# To change: REGISTRY, here and in the files that name the image. Python has to be the laptop's, to the minor version.
FROM python:3.11-slim-bookworm

# wget: KubeRay's probes ask with it. rsync, sudo: `ray up` brings files with them.
RUN apt-get update \
    && apt-get install -y --no-install-recommends curl openssh-client procps rsync sudo wget \
    && rm -rf /var/lib/apt/lists/*

# torch brings its CUDA with it, the machine its driver and the NVIDIA container toolkit. A driver that is too old for that
# CUDA wants torch for an older one: --extra-index-url https://download.pytorch.org/whl/cu126 in the line of pip.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /opt/orchestrator
COPY cluster/docker/requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt

COPY pyproject.toml README.md LICENSE ./
COPY orchestrator orchestrator
COPY plugins plugins
RUN pip install --no-cache-dir --no-deps .
COPY --chmod=755 cluster/vms/notice.sh /usr/local/bin/notice

# Not root: what a job runs is somebody's code. 1000 is the user of most machine images, whose files are mounted.
RUN useradd --create-home --uid 1000 --shell /bin/bash ray
USER ray
WORKDIR /home/ray
