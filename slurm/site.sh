# shellcheck shell=bash
# What differs between clusters; read by all jobs here. README.md in this folder says more.

# The Python of the environment that `make install` made; load modules or activate another environment here.
#   module load python/3.11 cuda/12.6
PYTHON=${PYTHON:-.venv/bin/python}

# The network between nodes, if there are several and the wrong one is chosen (`ip -brief address` lists them).
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# NCCL, and PyTorch's loader processes, say what they wait for when something hangs.
export PYTHONFAULTHANDLER=1
