"""The ``torchspec`` command. Command modules import torch and ray only once a command needs them."""
