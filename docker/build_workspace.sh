#!/usr/bin/env bash
# Builds the ROS path on a machine with ROS 2: diwa_core into .venv-ros beside the system's packages, then both ROS packages with colcon.
# Arguments go to `colcon build --cmake-args`.
set -eo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source docker/ros_setup.sh

python3 -m venv --system-site-packages .venv-ros
source .venv-ros/bin/activate
# pybullet has no wheel for Python 3.12 (Ubuntu 24.04) and is compiled there, which takes some minutes.
python -m pip install --quiet -c constraints.txt -e . colcon-common-extensions "setuptools<80"
touch .venv-ros/COLCON_IGNORE

cd ros2_ws
python -m colcon build --cmake-args -DBUILD_TESTING=OFF "$@"
