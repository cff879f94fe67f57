# The image of experiments/clusters/{aws,gcp,kuberay}.yaml: docker build -t REGISTRY/dpsink:0.1.0 . && docker push …
FROM python:3.12-slim

# What Ray's launcher (on an autoscaling head, too), KubeRay's probes and the start commands call.
RUN apt-get update && apt-get install -y --no-install-recommends curl openssh-client procps rsync wget \
    && rm -rf /var/lib/apt/lists/*

# The NVIDIA runtime shows a container the node's GPUs and its driver if it is asked; CUDA itself comes with PyTorch.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# As the README installs it, with what an autoscaling head calls its cloud by.
WORKDIR /opt/dpsink
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY dpsink dpsink
COPY tune tune
COPY analysis analysis
RUN pip install --no-cache-dir ".[clouds]"
