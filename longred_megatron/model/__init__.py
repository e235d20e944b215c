"""Student and teachers as chunks of Megatron's GPTModel: attention, rotary tables, taps, injected losses."""
