"""The experiments of the MuDSC paper."""
