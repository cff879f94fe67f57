# The image of experiments/clusters/{aws,gcp,kuberay}.yaml: docker build -t REGISTRY/dpsink:0.1.0 . && docker push …
FROM python:3.12-slim

# What Ray's launcher, KubeRay's probes and the start commands call.
RUN apt-get update && apt-get install -y --no-install-recommends curl procps rsync wget && rm -rf /var/lib/apt/lists/*

# As the README installs it; the CUDA libraries come with PyTorch, the driver from the node.
WORKDIR /opt/dpsink
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY dpsink dpsink
COPY tune tune
COPY analysis analysis
RUN pip install --no-cache-dir .
