# A CUDA machine: llama.cpp built with CUDA, and the README's two commands inside. Nobody has built it yet.
#   docker build -t palign .
#   docker run --gpus all -v "$PWD/runs:/palign/runs" palign
# The host's driver must be 580 or newer: torch from PyPI is built for CUDA 13.0.
#
# The tests need no GPU. Without --gpus there is no libcuda, so the toolkit's stub of it stands in:
#   docker run -e LD_LIBRARY_PATH=/usr/local/cuda/lib64:/usr/local/cuda/lib64/stubs palign \
#     sh -c "pip install -r tests/requirements.txt && python -m pytest tests"
FROM python:3.11-slim-bookworm AS python

FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
COPY --from=python /usr/local /usr/local
RUN apt-get update \
 && apt-get install -y --no-install-recommends \
      ca-certificates g++ cmake git \
      libbz2-1.0 libexpat1 libffi8 liblzma5 libreadline8t64 libsqlite3-0 libssl3t64 \
 && rm -rf /var/lib/apt/lists/* && ldconfig \
 && ln -s libcuda.so /usr/local/cuda/lib64/stubs/libcuda.so.1

# Not the builder's own CPU and card, so that it builds on a machine without a GPU and runs on another:
# Turing, Ampere, Ada, Hopper, Blackwell. While llama.cpp links, the stub stands in for the driver, and
# programs that are linked on the way may leave the driver's symbols open.
ENV CMAKE_ARGS="-DGGML_CUDA=on -DGGML_NATIVE=off -DCMAKE_CUDA_ARCHITECTURES=75;80;86;89;90;120 -DCMAKE_EXE_LINKER_FLAGS=-Wl,--allow-shlib-undefined" \
    LIBRARY_PATH=/usr/local/cuda/lib64/stubs \
    PYTHONUNBUFFERED=1
WORKDIR /palign
COPY requirements.txt .
COPY tests/requirements.txt tests/requirements.txt
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
CMD ["sh", "-c", "pip install -r requirements.txt && python palign.py run configs/smoke.yaml"]
