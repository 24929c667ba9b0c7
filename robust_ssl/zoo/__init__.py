"""Encoders that the package ships, one folder each; read them with `robust_ssl.weights`."""
