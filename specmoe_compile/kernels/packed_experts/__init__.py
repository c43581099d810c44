"""Experts whose weights are codes and scales: decoding them inside the products of decode."""
