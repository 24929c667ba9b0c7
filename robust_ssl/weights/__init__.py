"""Encoders on disk: this package's own format, the shipped ones, and foreign files in and out."""

from robust_ssl.weights.native import encoder_card, list_encoders, load_encoder, save_encoder

__all__ = ["encoder_card", "list_encoders", "load_encoder", "save_encoder"]
