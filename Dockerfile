# docker build -t liver .                           torch for the CPU
# docker build -t liver --build-arg TORCH=cu126 .   for NVIDIA's GPUs; run it with --gpus all
# docker run --rm liver                             the demo
# docker run --rm -v "$PWD:/scans" liver python apply_model.py /scans/ct.nii.gz \
#     --checkpoint checkpoints/starter.pt --destination /scans/results
FROM python:3.12-slim

# What VTK draws with where there is no display, and the Makefile's make.
RUN apt-get update \
    && apt-get install -y --no-install-recommends make libegl1 libgl1 libglx-mesa0 libgomp1 libxrender1 \
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
