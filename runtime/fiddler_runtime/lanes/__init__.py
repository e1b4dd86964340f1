"""The lanes of one MoE layer: resident and streamed experts on the accelerator, the rest on the CPU."""
