"""What `tools/gpu_check.sh` runs on a machine with a GPU. One module per stage; each writes JSON.

Nothing here is part of the installed package.
"""
