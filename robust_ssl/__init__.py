"""Adversarial robustness of pre-trained encoders."""
