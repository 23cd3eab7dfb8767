# An image that predicts, trains and exports, with kernels compiled ahead of time.
#
#   docker build -t coded-resnext .                                           # for CPUs
#   docker build -t coded-resnext:cuda --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04 \
#       --build-arg TORCH_INDEX=https://pypi.org/simple --build-arg CODED_RESNEXT_BUILD_ARCHS="80 90 100" .
#   docker run --rm --gpus all coded-resnext:cuda doctor
ARG BASE=ubuntu:24.04
FROM ${BASE}

# Where torch comes from: wheels for CPUs, or those of PyPI, which bring CUDA's libraries.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Compute capabilities, with spaces between them; none are compiled without any.
ARG CODED_RESNEXT_BUILD_ARCHS=""

# On a GPU Triton compiles a small library of its own, so that a C compiler stays in the image.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:${PATH} \
    CODED_RESNEXT_KERNELS=/opt/kernels

COPY . /opt/source
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" "torch>=2.11" "torchvision>=0.26" \
    && pip install --no-cache-dir "/opt/source[train,report,export]"
RUN mkdir /opt/kernels \
    && for arch in ${CODED_RESNEXT_BUILD_ARCHS}; do \
        coded-resnext build-kernels --arch "${arch}" --out /opt/kernels || exit 1; \
    done \
    && rm -rf /opt/kernels/build

RUN useradd --create-home --uid 10001 user
USER 10001
WORKDIR /home/user
ENTRYPOINT ["coded-resnext"]
CMD ["doctor"]
