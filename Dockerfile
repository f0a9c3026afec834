# docker build -t liver .                            torch for NVIDIA's GPUs; run it with --gpus all
# docker build -t liver --build-arg INDEX=URL .      URL: what pytorch.org names for "CPU", smaller
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
ARG INDEX
RUN python -m venv .venv \
    && .venv/bin/pip install --no-cache-dir "$(grep -o '^torch=[^ ]*' requirements.txt)" ${INDEX:+--index-url "$INDEX"} \
    && .venv/bin/pip install --no-cache-dir -r requirements.txt \
    && touch .venv/installed
ENV PATH="/liver/.venv/bin:$PATH" MPLBACKEND=Agg
COPY . .

CMD ["make", "demo"]
