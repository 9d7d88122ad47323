#!/usr/bin/env bash
# Installs what the ROS path needs beside ros-base, for the ROS 2 that is there: bash docker/ros_packages.sh [--list] [more packages]
# Known good names in Jazzy and Lyrical. Camera drivers are a matter of the camera: give them as arguments.
set -eo pipefail

distribution=${ROS_DISTRO:?expected the name of a ROS 2 distribution in ROS_DISTRO, as jazzy}
packages=(build-essential iputils-ping python3-dev python3-venv)
for name in cv-bridge joy rmw-fastrtps-cpp rosbag2 rosbag2-storage-mcap sros2; do
  packages+=("ros-$distribution-$name")
done
if [ "${1:-}" = --list ]; then
  printf '%s\n' "${packages[@]}" "${@:2}"
  exit 0
fi
apt-get update
apt-get install -y --no-install-recommends "${packages[@]}" "$@"
rm -rf /var/lib/apt/lists/*
