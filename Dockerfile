# docker build -t gspn-dit . && docker run --gpus all -v "$PWD/runs:/gspn-dit/runs" gspn-dit gspn-train --config configs/demo.yaml
# PyTorch's wheels bring CUDA's libraries and CuPy compiles the scans with NVRTC, so the base image has no toolkit.
FROM nvidia/cuda:13.0.0-base-ubuntu24.04

# g++ compiles the CPU scans, with python3-dev what torch.compile writes.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH OMP_WAIT_POLICY=passive

WORKDIR /gspn-dit
COPY pyproject.toml setup.py setup.cfg constraints.txt MANIFEST.in README.md LICENSE train.py sample.py ./
COPY gspn_dit gspn_dit
COPY fid fid
COPY cuda cuda
COPY configs configs
RUN pip install --no-cache-dir -c constraints.txt -e '.[cuda13,text,timm]'

CMD ["gspn-doctor"]
