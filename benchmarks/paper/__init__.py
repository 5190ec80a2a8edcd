"""The experiments of the MuDSC paper (Xu et al., CVPR 2024), by one command: ``python -m paper NAME --data PATH``."""
