"""DiWA: world models, diffusion policies and fine-tuning in imagination. Never imports rclpy."""

__version__ = "0.1.0"
