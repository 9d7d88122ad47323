# The pip path: no ROS installation, the wheels bring it. The same commands as on any machine.
# Build from the top of the repository: docker build -f docker/pip.Dockerfile -t diwa:pip .
FROM python:3.11-slim-bookworm

RUN apt-get update && apt-get install -y --no-install-recommends build-essential iputils-ping && rm -rf /var/lib/apt/lists/*
WORKDIR /diwa
COPY . .
RUN bash scripts/setup.sh
ENV HOME=/tmp

ENTRYPOINT [".venv/bin/diwa"]
CMD ["demo"]
