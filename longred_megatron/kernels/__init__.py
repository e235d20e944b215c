"""The mathematics of the losses: functions of tensors, without Megatron."""
