#!/usr/bin/env bash
# Runs a command in the built workspace: bash docker/enter_workspace.sh ros2 launch diwa_ros deploy.launch.py
set -eo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source docker/ros_setup.sh
source .venv-ros/bin/activate
source ros2_ws/install/setup.bash
exec "$@"
