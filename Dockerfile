# A CUDA machine: llama.cpp built with CUDA, the same two commands inside.
#   docker build -t palign . && docker run --gpus all -v "$PWD/runs:/palign/runs" palign
#   docker run palign sh -c "pip install -r tests/requirements.txt && python -m pytest tests"
FROM python:3.11-slim-bookworm AS python

FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
COPY --from=python /usr/local /usr/local
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ cmake git libffi8 libsqlite3-0 libbz2-1.0 liblzma5 libreadline8t64 \
 && rm -rf /var/lib/apt/lists/* && ldconfig
# The stub stands in for the driver while llama.cpp links; the real one comes with --gpus all.
ENV CMAKE_ARGS="-DGGML_CUDA=on" LIBRARY_PATH=/usr/local/cuda/lib64/stubs PYTHONUNBUFFERED=1
WORKDIR /palign
COPY requirements.txt .
COPY tests/requirements.txt tests/requirements.txt
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
CMD ["sh", "-c", "pip install -r requirements.txt && python palign.py run configs/smoke.yaml"]
