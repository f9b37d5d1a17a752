# syntax=docker/dockerfile:1
# Two images. No container engine was at hand where this was written: linted, never built.
#
#   docker build -t megatron-llama-moe .                    GPU: training on a cluster
#   docker build -t megatron-llama-moe:cpu --target cpu .   CPU: the demo and the tests
#   docker run --rm -it megatron-llama-moe:cpu              make demo
#   docker run --rm --gpus all --shm-size 8g --ulimit memlock=-1 --entrypoint python \
#       megatron-llama-moe tools/doctor.py                  what the GPU image finds on a machine
#
# docs/cluster.md says how to turn the first into what enroot/pyxis or apptainer start.

ARG NGC_TAG=26.05-py3
ARG PYTHON_TAG=3.11.14-slim-bookworm

# --- CPU --------------------------------------------------------------------------------------------
FROM python:${PYTHON_TAG} AS cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Versions are the pinned base's: Debian keeps no older ones to ask for.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make procps \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 trainer \
    && install --directory --owner trainer /opt/project
USER 10001
WORKDIR /opt/project
ENV PIP_NO_CACHE_DIR=1
# What decides on the environment comes first, so that a change of code does not build it again.
COPY --chown=trainer Makefile pyproject.toml constraints-cpu.txt README.md LICENSE ./
COPY --chown=trainer megatron_ext/__init__.py megatron_ext/__init__.py
RUN make setup TORCH_INDEX="${TORCH_INDEX}"
COPY --chown=trainer . .
HEALTHCHECK --interval=5m --timeout=1m \
    CMD ["/opt/project/.venv-3.11/bin/python", "-c", "import torch, megatron.core, megatron_ext"]
CMD ["make", "demo"]

# --- GPU: what the image does not have, in an environment on top of what it has ---------------------
FROM nvcr.io/nvidia/pytorch:${NGC_TAG} AS environment
WORKDIR /opt/project
ENV PIP_NO_CACHE_DIR=1
COPY pyproject.toml README.md LICENSE ./
COPY megatron_ext/__init__.py megatron_ext/__init__.py
# The image's own torch, built for its CUDA, NCCL and TransformerEngine, must stay; its list of
# constraints would hold back what it ships too old.
RUN python -m venv --system-site-packages /opt/environment \
    && python -c 'import torch; print(f"torch=={torch.__version__}")' > /opt/torch.txt \
    && PIP_CONSTRAINT=/opt/torch.txt /opt/environment/bin/python -m pip install --editable .

# --- GPU: the image that trains (the default target) ------------------------------------------------
FROM nvcr.io/nvidia/pytorch:${NGC_TAG} AS gpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends procps \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 trainer
COPY --from=environment /opt/environment /opt/environment
COPY pretrain_moe.py finetune_moe.py pyproject.toml README.md LICENSE /opt/project/
COPY megatron_ext /opt/project/megatron_ext
COPY tools /opt/project/tools
COPY examples /opt/project/examples
ENV PATH=/opt/environment/bin:$PATH \
    PYTHONPATH=/opt/project
WORKDIR /opt/project
USER 10001
# Without a GPU the container is of no use: say so before a job waits for it.
HEALTHCHECK --interval=5m --timeout=1m \
    CMD ["python", "-c", "import megatron.core, torch; assert torch.cuda.device_count()"]
ENTRYPOINT ["examples/launch/torchrun.sh"]
CMD ["pretrain_moe.py", "--help"]
