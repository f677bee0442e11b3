"""What methods of generation share: recipes of prompts, schedules and samplers (`config`), denoisers and their training
(`denoising`), the product that draws samples (`product`), and the probe by which samples are judged (`judging`)."""
