@echo off
rem the high-noise expert alone
set MODELS=C:\models\wan
accelerate launch --num_processes 2 wan_train_network.py ^
  --task i2v-A14B --dit %MODELS%\wan2.2_i2v_high_noise_14B_fp16.safetensors ^
  --vae "%MODELS%\wan 2.1 vae.safetensors" ^
  --min_timestep 900 --max_timestep 1000 --preserve_distribution_shape ^
  --xformers --split_attn --blocks_to_swap 20 --block_swap_h2d_only ^
  --optimizer_type Lion --learning_rate=5e-5 ^
  --timestep_sampling logsnr --logit_mean -6.0 --logit_std 2.0 ^
  --num_timestep_buckets 8 --network_module networks.lora_wan --network_weights start.safetensors --dim_from_weights ^
  --scale_weight_norms 1 --base_weights a.safetensors b.safetensors --base_weights_multiplier 0.5 1.0 ^
  --save_every_n_steps 100 --save_state --save_last_n_steps_state 300 --resume C:\old-state ^
  --brand_new_option 3 --output_name high
