# The ROS path: an ordinary ROS 2 (Jazzy; ROS_DISTRO=lyrical for Lyrical), the workspace built with colcon.
# Build from the top of the repository: docker build -f docker/ros.Dockerfile -t diwa:jazzy .
ARG ROS_DISTRO=jazzy
FROM ros:${ROS_DISTRO}-ros-base
ARG ROS_DISTRO
ARG EXTRA_PACKAGES=""
ARG SIMULATION=yes

WORKDIR /diwa
COPY docker/ros_packages.sh docker/
RUN bash docker/ros_packages.sh ${EXTRA_PACKAGES}
COPY . .
RUN DIWA_SIMULATION=${SIMULATION} bash docker/build_workspace.sh
ENV RMW_IMPLEMENTATION=rmw_fastrtps_cpp HOME=/tmp

ENTRYPOINT ["bash", "docker/enter_workspace.sh"]
CMD ["ros2", "launch", "diwa_ros", "deploy.launch.py"]
