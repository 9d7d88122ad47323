"""Builds diwa_ros for colcon; the pip path installs the same modules from the pyproject.toml at the top. Executables: setup.cfg."""

from glob import glob

from setuptools import setup

TOP = "../../.."  # launch/ and config/ belong to the whole repository, not to this package

setup(
    name="diwa_ros",
    version="0.1.0",
    packages=["diwa_ros"],
    data_files=[
        ("share/ament_index/resource_index/packages", ["resource/diwa_ros"]),
        ("share/diwa_ros", ["package.xml"]),
        ("share/diwa_ros/launch", glob(f"{TOP}/launch/*.launch.py")),
        ("share/diwa_ros/config", glob(f"{TOP}/config/*.yaml") + glob(f"{TOP}/config/*.xml")),
    ],
    install_requires=["setuptools"],
    zip_safe=True,
    maintainer="DiWA on ROS 2 maintainers",
    maintainer_email="maintainers@example.org",
    description="The nodes of the DiWA graph",
    license="Apache-2.0",
)
