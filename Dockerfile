# The command line in an image, as a user without rights. From the repository's folder:
#   docker build --target cpu -t foretune:cpu .
#   docker run --rm -v "$PWD:/data" --user "$(id -u):$(id -g)" foretune:cpu run quickstart
#   docker build --target cuda -t foretune:cuda .
#   docker run --rm --gpus all -v "$PWD:/data" --user "$(id -u):$(id -g)" foretune:cuda run my.yaml
# What is written lands in the folder that is mounted as /data. More extras of pyproject.toml:
#   docker build --target cuda --build-arg EXTRAS=quickstart,smollm,quant -t foretune:cuda .
FROM python:3.11.14-slim-bookworm AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 HOME=/home/foretune
RUN useradd --create-home --uid 1000 foretune \
    && chmod 0777 /home/foretune \
    && install -d -m 0777 /data
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY src ./src

FROM base AS cpu
ARG EXTRAS=quickstart
RUN pip install -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu ".[${EXTRAS}]"
USER foretune
WORKDIR /data
ENTRYPOINT ["foretune"]
CMD ["--help"]

# PyPI's torch brings CUDA itself; the host needs NVIDIA's driver and its container toolkit.
FROM base AS cuda
ARG EXTRAS=quickstart
RUN pip install -c constraints.txt ".[${EXTRAS}]"
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER foretune
WORKDIR /data
ENTRYPOINT ["foretune"]
CMD ["--help"]
