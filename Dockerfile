# Three images from one file: operator, sidecar (weatherlight, kasmina, tamiyo; no torch) and runtime (tolaria).
#
#   docker build --target operator -t esper/operator:dev .
#   docker build --target sidecar  -t esper/sidecar:dev  .
#   docker build --target runtime  -t esper/runtime:dev  .                      # torch for CPUs
#   docker build --target runtime --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cu130 …   # CUDA 13
#
# RUNTIME_BASE may already hold torch (a vendor's or your own image with Python >= 3.11): it is then left as it is.
ARG PYTHON_BASE=python:3.13-slim
ARG RUNTIME_BASE=python:3.13-slim

# --- wheels of the three distributions ------------------------------------------------------------------------
FROM ${PYTHON_BASE} AS wheels
RUN python -m venv /build
COPY proto /src/proto
COPY operator /src/operator
COPY runtime /src/runtime
RUN --mount=type=cache,target=/root/.cache/pip \
    /build/bin/pip wheel --no-deps --wheel-dir /wheels /src/proto /src/operator /src/runtime

# --- operator ---------------------------------------------------------------------------------------------------
FROM ${PYTHON_BASE} AS operator-build
COPY docker/operator.txt /tmp/requirements.txt
# Bytecode is compiled here because the root file system is read-only later; the generated API models of the
# client library are compiled on import instead, since the operator loads almost none of them.
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv --without-pip /opt/esper \
 && python -m pip --python /opt/esper/bin/python install --no-compile -r /tmp/requirements.txt
COPY docker/trim.py /tmp/trim.py
RUN /opt/esper/bin/python /tmp/trim.py
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    python -m pip --python /opt/esper/bin/python install --no-deps --no-compile /wheels/esper_leyline-*.whl /wheels/esper_operator-*.whl \
 && /opt/esper/bin/python -m compileall -q -x 'kubernetes/(aio/)?client/(models|api)/' /opt/esper/lib

FROM ${PYTHON_BASE} AS operator
COPY --from=operator-build /opt/esper /opt/esper
ENV USER=esper PATH=/opt/esper/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
USER 65532:65532
ENTRYPOINT ["python", "-m", "esper_operator"]
LABEL org.opencontainers.image.title="Esper operator" org.opencontainers.image.licenses="Apache-2.0"

# --- sidecar ----------------------------------------------------------------------------------------------------
FROM ${PYTHON_BASE} AS sidecar-build
COPY docker/sidecar.txt /tmp/requirements.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv --without-pip /opt/esper \
 && python -m pip --python /opt/esper/bin/python install --no-compile -r /tmp/requirements.txt
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    python -m pip --python /opt/esper/bin/python install --no-deps --no-compile /wheels/esper_leyline-*.whl /wheels/esper_runtime-*.whl \
 && /opt/esper/bin/python -m compileall -q /opt/esper/lib

FROM ${PYTHON_BASE} AS sidecar
COPY --from=sidecar-build /opt/esper /opt/esper
ENV USER=esper PATH=/opt/esper/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
USER 10004:10000
LABEL org.opencontainers.image.title="Esper sidecars" org.opencontainers.image.licenses="Apache-2.0"

# --- runtime ----------------------------------------------------------------------------------------------------
FROM ${RUNTIME_BASE} AS runtime
ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
COPY docker/runtime.txt /tmp/requirements.txt
# The virtual environment sees the base image's packages, so that a torch of the base is used and not replaced.
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv --system-site-packages /opt/esper \
 && (/opt/esper/bin/python -c "import torch" 2>/dev/null \
     || /opt/esper/bin/python -m pip install --no-compile --index-url "$TORCH_INDEX_URL" "torch==$TORCH_VERSION") \
 && /opt/esper/bin/python -m pip install --no-compile -r /tmp/requirements.txt \
 && rm /tmp/requirements.txt \
 && /opt/esper/bin/python -m compileall -q /opt/esper/lib
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    /opt/esper/bin/python -m pip install --no-deps /wheels/esper_leyline-*.whl /wheels/esper_runtime-*.whl \
 && /opt/esper/bin/python -c "import torch, esper_runtime; torch.ones(2).sum()"
ENV USER=esper PATH=/opt/esper/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
USER 10001:10000
LABEL org.opencontainers.image.title="Esper runtime" org.opencontainers.image.licenses="Apache-2.0"
