# The ROS path: an ordinary ROS 2 Jazzy, the workspace built with colcon, `ros2 launch diwa_ros deploy.launch.py`.
# Build from the top of the repository: docker build -f docker/ros.Dockerfile -t diwa:ros .
FROM ros:jazzy-ros-base

RUN apt-get update && apt-get install -y --no-install-recommends python3-venv ros-jazzy-cv-bridge ros-jazzy-rosbag2 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /diwa
COPY . .
RUN bash docker/build_workspace.sh

ENTRYPOINT ["bash", "docker/enter_workspace.sh"]
CMD ["ros2", "launch", "diwa_ros", "deploy.launch.py"]
