"""Builds DeepSpeed's shared-memory operator once, so that the first run does not wait for the compiler."""

from deepspeed.accelerator import get_accelerator

get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
