"""Reads studies back from MLflow: selects, compares, exports.

`runs` → `selection` → `figures`, `export` → `cli`; each imports only what stands before it.
"""
