"""Encoders and classifiers on disk: our own format, the shipped ones, foreign files in and out."""

from robust_ssl.weights.cards import seal_card
from robust_ssl.weights.classifiers import classifier_card, load_classifier, save_classifier
from robust_ssl.weights.convert import convert_encoder, import_encoder, inspect_file, is_foreign
from robust_ssl.weights.export import export_safetensors, export_stablehlo, load_stablehlo
from robust_ssl.weights.native import (
    encoder_card,
    list_encoders,
    load_encoder,
    save_encoder,
)
from robust_ssl.weights.screens import load_screen, save_screen
from robust_ssl.weights.torch_export import export_onnx, export_torch
from robust_ssl.weights.transforms import resizing_of

__all__ = [
    "classifier_card",
    "convert_encoder",
    "encoder_card",
    "export_onnx",
    "export_safetensors",
    "export_stablehlo",
    "export_torch",
    "import_encoder",
    "inspect_file",
    "is_foreign",
    "list_encoders",
    "load_classifier",
    "load_encoder",
    "load_screen",
    "load_stablehlo",
    "resizing_of",
    "save_classifier",
    "save_encoder",
    "save_screen",
    "seal_card",
]
