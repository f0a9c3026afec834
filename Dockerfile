# docker build -t liver .                           torch for the CPU
# docker build -t liver --build-arg TORCH=cu126 .   for NVIDIA's GPUs; run it with --gpus all
# docker run --rm liver                             the demo
# docker run --rm -v "$PWD/data:/liver/data" -v "$PWD/results:/liver/results" liver python apply_model.py data/scan.nii.gz --checkpoint checkpoints/starter.pt
FROM python:3.12-slim

# What VTK draws with where there is no display, and the Makefile's make.
RUN apt-get update \
    && apt-get install -y --no-install-recommends make libgl1 libglx-mesa0 libosmesa6 libxrender1 libgomp1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /liver
COPY requirements.txt .
ARG TORCH=cpu
RUN python -m venv .venv \
    && .venv/bin/pip install --no-cache-dir "$(grep ^torch= requirements.txt)" \
        --index-url "https://download.pytorch.org/whl/$TORCH" \
    && .venv/bin/pip install --no-cache-dir -r requirements.txt \
    && touch .venv/installed
ENV PATH="/liver/.venv/bin:$PATH" MPLBACKEND=Agg
COPY . .

CMD ["make", "demo"]
