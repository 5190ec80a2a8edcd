"""Specifications of architecture families, one file per family.

`layers` has the building blocks. A family adds up the partial specifications of its layers in the order of the
network.
"""
