# Sourced by the scripts beside it: finds and sources one ROS 2. ROS_SETUP names its setup.bash, else the first one in /opt/ros is taken.
setup=${ROS_SETUP:-$(find /opt/ros -maxdepth 2 -name setup.bash 2>/dev/null | sort | head -1)}
if [ ! -f "$setup" ]; then
  echo "diwa: no ROS 2 found in /opt/ros. Install one (ros-jazzy-ros-base) or name its setup.bash with ROS_SETUP=." >&2
  exit 1
fi
source "$setup"
