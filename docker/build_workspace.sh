#!/usr/bin/env bash
# Builds the ROS path on a machine with ROS 2: diwa_core into .venv-ros beside the system's packages, then both ROS packages with colcon.
# Arguments go to `colcon build --cmake-args`. DIWA_SIMULATION=no leaves pybullet out: without the play table, for machines of a real robot.
set -eo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source docker/ros_setup.sh

python3 -m venv --system-site-packages .venv-ros
source .venv-ros/bin/activate
touch .venv-ros/COLCON_IGNORE
leave_out=()
if [ "${DIWA_SIMULATION:-yes}" = no ]; then
  leave_out=(--without pybullet)
fi
# pybullet has no wheel for Python 3.12 (Jazzy) and later and is compiled there, which takes some minutes.
python scripts/requirements.py dependencies franka "${leave_out[@]}" > .venv-ros/requirements.txt
python -m pip install --quiet -c constraints.txt -r .venv-ros/requirements.txt colcon-common-extensions "setuptools<80"
python -m pip install --quiet --no-deps --no-build-isolation -e .

cd ros2_ws
python -m colcon build --cmake-args -DBUILD_TESTING=OFF "$@"
