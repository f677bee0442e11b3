"""How figures are shown to a reader: title, unit, digits, which way is better, and one sentence of what each means."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Quantity:
    """How one named figure is shown. `better` is 1 where higher is better, -1 where lower is, 0 where nothing is
    known."""

    title: str
    unit: str = ""
    scale: float = 1.0
    decimals: int | None = None  # None: three significant digits
    better: int = 0
    meaning: str = ""
    prefixes: bool = False  # thousands, millions or billions, whichever suits the largest value shown

    def suited_to(self, largest: float) -> Quantity:
        """The same figure in the unit that suits values up to `largest`: k, M or G before the unit, where it takes
        prefixes."""
        measure = abs(largest * self.scale)
        if not self.prefixes or not measure >= 1000:
            return self
        power = min(3, int(math.log10(measure)) // 3)
        return replace(self, unit=" kMG"[power] + self.unit, scale=self.scale / 1000**power)

    @property
    def header(self) -> str:
        """Title with unit, for a column or an axis."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    @property
    def difference_unit(self) -> str:
        """The unit of a difference: percentage points for percent."""
        return "points" if self.unit == "%" else self.unit

    def digits(self, value: float, like: float | None = None) -> str:
        """The value in this unit, without the unit; an en dash for NaN. With `like`, to as many decimals as that value
        has."""
        x = value * self.scale
        if not math.isfinite(x):
            return "–" if math.isnan(x) else ("∞" if x > 0 else "−∞")
        measure = x if like is None else like * self.scale
        decimals = self.decimals
        if decimals is None:
            if 0 < abs(measure) < 1e-4:
                return f"{x:.2e}".replace("-", "−")
            decimals = 0 if measure == round(measure) else max(0, 2 - math.floor(math.log10(abs(measure))))
        return f"{x:,.{decimals}f}".replace("-", "−")

    def signed(self, value: float) -> str:
        """As `digits`, with a plus sign for what is not negative."""
        text = self.digits(value)
        return text if math.isnan(value) or text.startswith("−") else f"+{text}"

    def text(self, value: float) -> str:
        """The value with its unit."""
        return "–" if math.isnan(value) else f"{self.digits(value)} {self.unit}".strip()


_KNOWN = {
    "accuracy": Quantity(
        "Accuracy", "%", 100, 2, 1, "Share of test samples whose most probable class is the right one."
    ),
    "accuracy_top5": Quantity(
        "Top-5 accuracy", "%", 100, 2, 1, "Share of test samples whose right class is among the five most probable."
    ),
    "accuracy_base": Quantity(
        "Accuracy, base", "%", 100, 2, 1, "Accuracy on the classes that training saw, among these."
    ),
    "accuracy_new": Quantity(
        "Accuracy, new", "%", 100, 2, 1, "Accuracy on the classes that training did not see, among these."
    ),
    "accuracy_harmonic": Quantity(
        "Accuracy, harmonic", "%", 100, 2, 1, "Harmonic mean of the accuracies on base and on new classes."
    ),
    **{
        f"{way}_r{rank}": Quantity(
            f"{title} R@{rank}",
            "%",
            100,
            2,
            1,
            f"Share of {query} that have a right {answer} among the {rank} nearest.",
        )
        for way, title, query, answer in (
            ("image_to_text", "Image to text", "images", "text"),
            ("text_to_image", "Text to image", "texts", "image"),
        )
        for rank in (1, 5, 10)
    },
    **{
        f"matched_{way}_r{rank}": Quantity(
            f"{title} R@{rank}, by matching",
            "%",
            100,
            2,
            1,
            f"Share of {query} that have a right {answer} among the {rank} best, where the nearest are ranked again by "
            "reading both together.",
        )
        for way, title, query, answer in (
            ("image_to_text", "Image to text", "images", "text"),
            ("text_to_image", "Text to image", "texts", "image"),
        )
        for rank in (1, 5, 10)
    },
    **{
        f"{name}_{way}_r{rank}": Quantity(
            f"{title}: {direction} R@{rank}",
            "%",
            100,
            2,
            1,
            f"Share of {query} that have a right {answer} among the {rank} nearest, {how}.",
        )
        for name, title, how in (
            ("whole", "Whole frames", "where every frame is read whole"),
            ("interleaved", "Interleaved", "where frames between key frames are read in part"),
            ("copied", "Key frames", "where a frame has the embedding of its key frame"),
        )
        for way, direction, query, answer in (
            ("image_to_text", "frame to text", "frames", "text"),
            ("text_to_image", "text to frame", "texts", "frame"),
        )
        for rank in (1, 5, 10)
    },
    **{
        f"{name}_grounding": Quantity(
            f"{title}: grounding",
            "%",
            100,
            2,
            1,
            f"Share of captions whose moment in a video is found to a half (IoU of 0.5), {how}.",
        )
        for name, title, how in (
            ("whole", "Whole frames", "where every frame is read whole"),
            ("interleaved", "Interleaved", "where frames between key frames are read in part"),
            ("copied", "Key frames", "where a frame has the embedding of its key frame"),
        )
    },
    "frame_cosine": Quantity(
        "Cosine to whole frames", "", 1, 4, 1, "Of embeddings of partly read frames with those of whole ones, a mean."
    ),
    "copied_cosine": Quantity(
        "Cosine of key frames", "", 1, 4, 0, "Of embeddings of key frames with those of the frames after them, a mean."
    ),
    "key_share": Quantity("Key frames, share", "%", 100, 1, 0, "Frames of a video that are read whole."),
    "multiply_adds_share": Quantity(
        "Multiply-adds, share", "%", 100, 1, -1, "Of reading a video, over reading every frame whole."
    ),
    "time_share": Quantity("Time, share", "%", 100, 1, -1, "Of reading a video, over reading every frame whole."),
    "frame_ms": Quantity("Time a frame", "ms", 1, None, -1, "Of a video, on average, where frames are read in part."),
    "whole_frame_ms": Quantity("Time a whole frame", "ms", 1, None, -1, "Of a video where every frame is read whole."),
    "matching_accuracy": Quantity(
        "Matching accuracy", "%", 100, 2, 1, "Pairs, right and wrong in equal numbers, that are told apart."
    ),
    "masked_accuracy": Quantity(
        "Masked words", "%", 100, 2, 1, "Share of the words that tell captions apart that are found when masked."
    ),
    "masked_probability": Quantity(
        "Masked words, probability", "%", 100, 2, 1, "Probability of the right word where it is masked, on average."
    ),
    "masked_accuracy_train": Quantity(
        "Masked words, training images",
        "%",
        100,
        2,
        1,
        "Likewise of training images, whose captions are right here, even where they were wrong in training.",
    ),
    "masked_probability_train": Quantity(
        "Masked words, probability, training images",
        "%",
        100,
        2,
        1,
        "Likewise of training images, whose captions are right here, even where they were wrong in training.",
    ),
    "accuracy_ce_head": Quantity(
        "Accuracy, label head", "%", 100, 2, 1, "Accuracy of the head that learns from labels, alone."
    ),
    "accuracy_kd_head": Quantity(
        "Accuracy, teacher head", "%", 100, 2, 1, "Accuracy of the head that learns from the teacher, alone."
    ),
    "alpha": Quantity("Label head's share", "", 1, 2, 0, "Weight of the label head in the mixture of two heads."),
    "beta": Quantity("Teacher head's temperature", "", 1, 2, 0, "What the teacher head's logits are divided by."),
    "new_drop": Quantity(
        "Fall on new classes", "points", 100, 2, -1, "Accuracy on new classes at its best epoch less that of the last."
    ),
    "accuracy_teacher": Quantity(
        "Accuracy, teacher", "%", 100, 2, 0, "Accuracy of the teacher on the same test samples."
    ),
    "accuracy_source": Quantity(
        "Accuracy, source", "%", 100, 2, 1, "Mean accuracy on the domains that were trained on."
    ),
    "accuracy_before": Quantity(
        "Accuracy, before", "%", 100, 2, 1, "Accuracy of what training began from, after compression alone."
    ),
    "sparsity": Quantity(
        "Sparsity", "%", 100, 1, 0, "Share of the original's weights, of those that may go, that is gone."
    ),
    "gradient_cosine": Quantity(
        "Gradient cosine",
        "",
        1,
        3,
        1,
        "Cosine between the gradients of two losses by the features, mean over training; below 0 they conflict.",
    ),
    "accuracy_many": Quantity(
        "Accuracy, many", "%", 100, 2, 1, "Accuracy on classes of more than 100 training samples."
    ),
    "accuracy_medium": Quantity(
        "Accuracy, medium", "%", 100, 2, 1, "Accuracy on classes of 20 to 100 training samples."
    ),
    "accuracy_few": Quantity("Accuracy, few", "%", 100, 2, 1, "Accuracy on classes of fewer than 20 training samples."),
    "tail_gain": Quantity(
        "Tail gain",
        "points",
        100,
        2,
        1,
        "Accuracy of the tail's expert above that of the head's, on classes of fewer than 20 training samples.",
    ),
    "head_gain": Quantity(
        "Head gain",
        "points",
        100,
        2,
        1,
        "Accuracy of the head's expert above the tail's, on all other classes.",
    ),
    "expert_disagreement": Quantity(
        "Experts disagree", "%", 100, 2, 0, "Share of test samples to which two experts give different classes; mean."
    ),
    "weight_auroc": Quantity(
        "Weights, AUROC",
        "%",
        100,
        1,
        1,
        "How often an unlabelled image of a known class weighs more than one of an unknown class.",
    ),
    "weight_known": Quantity("Weight, known classes", "", 1, 3, 0, "Mean over unlabelled images of known classes."),
    "weight_foreign": Quantity("Weight, unknown classes", "", 1, 3, 0, "Mean over the others."),
    "pseudo_accuracy": Quantity(
        "Pseudo-labels", "%", 100, 1, 1, "Share of right pseudo-labels among unlabelled images of known classes."
    ),
    "moved": Quantity("Moved", "", 1, 0, 0, "Unlabelled images that became labelled ones."),
    "moved_precision": Quantity("Moved, right", "%", 100, 1, 1, "Share of them whose label is right."),
    "rank_correlation": Quantity(
        "Rank correlation", "", 1, 2, 1, "Spearman's correlation of sources' similarity with a student's accuracy."
    ),
    "distance": Quantity("Distance to the start", "", 1, 2, -1, "Euclidean, of the encoder's weights."),
    "distance_further": Quantity(
        "Distance, further", "", 1, 2, -1, "The same of the teacher, which was pre-trained further."
    ),
    "token_cosine": Quantity(
        "Token cosine", "", 1, 3, -1, "Mean cosine of the class token and the distillation token of test images."
    ),
    "components_cls": Quantity(
        "Components, class token", "", 1, 0, 0, "Principal components that hold 90 % of the variance over test images."
    ),
    "components_dist": Quantity("Components, distillation token", "", 1, 0, 0, "The same of the distillation token."),
    "f1": Quantity(
        "F1", "%", 100, 2, 1, "Harmonic mean of precision and recall over all that was found and asked for."
    ),
    "precision": Quantity("Precision", "%", 100, 2, 1, "Share of what was found that is right."),
    "recall": Quantity("Recall", "%", 100, 2, 1, "Share of what was to be found that was found."),
    "linear_probe": Quantity(
        "Linear probe", "%", 100, 1, 1, "Share of test images that a linear classifier of the embeddings gets right."
    ),
    "knn": Quantity("k nearest", "%", 100, 1, 1, "The same by the classes of the nearest embeddings."),
    "effective_rank": Quantity(
        "Effective rank", "", 1, 1, 0, "Of the embeddings of test images: how many directions they spread over."
    ),
    "map": Quantity("Mean AP", "%", 100, 2, 1, "Average precision of each label's ranking, mean over the labels."),
    "exact_match": Quantity(
        "All right", "%", 100, 2, 1, "Share of samples right as a whole: each label, or all of a text."
    ),
    "rouge_l": Quantity(
        "ROUGE-L", "%", 100, 2, 1, "Share of words in the longest common subsequence of written and right text."
    ),
    "miou": Quantity(
        "Mean IoU", "%", 100, 2, 1, "Intersection over union of predicted and true pixels, mean over the classes."
    ),
    "pixel_accuracy": Quantity(
        "Pixel accuracy", "%", 100, 2, 1, "Share of labelled pixels whose class is the right one."
    ),
    "psnr": Quantity(
        "PSNR, Y",
        "dB",
        1,
        2,
        1,
        "Peak signal-to-noise ratio of luma (BT.601, 16 to 235, not rounded; peak 255), without as many pixels at each "
        "side as the scale; mean over the images.",
    ),
    "ssim": Quantity(
        "SSIM, Y", "", 1, 4, 1, "Structural similarity of the same luma and region (Gaussian window of 11, sigma 1.5)."
    ),
    "psnr_uint8": Quantity("PSNR, Y rounded", "dB", 1, 2, 1, "As PSNR, of luma rounded to whole levels first."),
    "ssim_uint8": Quantity("SSIM, Y rounded", "", 1, 4, 1, "As SSIM, of luma rounded to whole levels first."),
    "psnr_rgb": Quantity("PSNR, RGB", "dB", 1, 2, 1, "As PSNR, over the three colours, 0 to 255."),
    "psnr_baseline": Quantity(
        "PSNR, bicubic", "dB", 1, 2, 0, "As PSNR, of the input enlarged by bicubic interpolation."
    ),
    "ssim_baseline": Quantity("SSIM, bicubic", "", 1, 4, 0, "As SSIM, of the input enlarged by bicubic interpolation."),
    "frechet": Quantity(
        "Frechet distance",
        better=-1,
        meaning="Between samples and training data, in the features of a classifier trained on the data: 0 where mean "
        "and covariance agree. Not comparable with distances in Inception's features.",
    ),
    "prompt_accuracy": Quantity(
        "Prompt followed", "%", 100, 1, 1, "Share of samples in which the judge sees a class that the prompt means."
    ),
    "modes": Quantity(
        "Modes",
        "",
        1,
        2,
        1,
        "Effective number of a prompt's classes among its samples that follow it: exp of the entropy.",
    ),
    "diversity": Quantity(
        "Diversity", "", 1, 3, 1, "Mean distance of two samples of a prompt, in the classifier's features."
    ),
    "blocks_kept": Quantity(
        "Blocks kept", "%", 100, 1, -1, "Share of pairs of blocks of tokens whose attention is computed."
    ),
    "jerk": Quantity(
        "Jerk",
        "pixels",
        1,
        3,
        0,
        "How unevenly what is bright moves: the mean second difference of its centre from frame to frame.",
    ),
    "prompt_accuracy_unseen": Quantity(
        "Prompt followed, unseen", "%", 100, 1, 1, "The same of captions that training never saw."
    ),
    **{
        f"{name}{suffix}": Quantity(f"{title}{which}", "%", 100, 1, 1, f"{meaning}{of}")
        for suffix, which, of in (("", "", "."), ("_unseen", ", unseen", ", of captions that training never saw."))
        for name, title, meaning in (
            ("object_accuracy", "Objects", "Share of a caption's things that the classifier sees in samples"),
            ("relation_accuracy", "Places", "Share of samples in which all of them stand as the caption wants"),
        )
    },
    "high_frequency_ratio": Quantity(
        "Fine detail", "", 1, 3, 0, "Power of samples at high frequencies over that of real images; 1 is as much."
    ),
    "high_frequency_gap": Quantity(
        "Fine detail, gap", "", 1, 3, -1, "How far the power at high frequencies is from that of real images, relative."
    ),
    "frechet_ratio": Quantity(
        "Frechet distance, relative", "", 1, 3, -1, "Frechet distance of a quantised generator over its teacher's."
    ),
    "frechet_teacher": Quantity("Frechet distance, teacher", better=0, meaning="The same of the teacher's samples."),
    "prompt_accuracy_teacher": Quantity(
        "Prompt followed, teacher", "%", 100, 1, 0, "The same of the teacher's samples."
    ),
    "kl_to_teacher": Quantity(
        "KL to the teacher", "nats", 1, 4, -1, "Forward KL of the tokens of unseen sequences, a token."
    ),
    "nll_teacher": Quantity("NLL, teacher", "nats", 1, 3, 0, "NLL of the teacher on the same sequences."),
    "token_agreement": Quantity(
        "Same token", "%", 100, 1, 1, "Share of unseen tokens at which both find the same one most probable."
    ),
    "sample_gap": Quantity(
        "Gap of samples",
        "",
        1,
        3,
        -1,
        "Root mean square difference of student's and teacher's samples of the same draws, in normalised pixels.",
    ),
    "noise_to_teacher": Quantity(
        "Noise to the teacher",
        "",
        1,
        None,
        -1,
        "Mean square difference of both predictions of noise, on unseen images.",
    ),
    "noise_mse": Quantity(
        "Noise error", "", 1, None, -1, "Mean square error of the predicted noise, on unseen images."
    ),
    "noise_mse_teacher": Quantity("Noise error, teacher", "", 1, None, 0, "The same of the teacher."),
    "total_bits": Quantity(
        "Total bits",
        "b",
        1,
        None,
        -1,
        "Of all parameters: quantised weights, their scales, and all else.",
        prefixes=True,
    ),
    "compute_bits": Quantity(
        "Compute bits",
        "b",
        1,
        None,
        -1,
        "Multiply-adds of one image's linear layers, each times the bits of both factors.",
        prefixes=True,
    ),
    "lift_same": Quantity(
        "Below the same format",
        "",
        1,
        3,
        1,
        "By how much log Frechet of distilled generators lies below that of rounded ones of the same format and as "
        "many bits, on fitted lines.",
    ),
    "lift_level": Quantity(
        "Below the next format", "", 1, 3, 1, "The same below rounded ones of the next format; above 0: a level is won."
    ),
    "probe_accuracy": Quantity(
        "Accuracy, judge", "%", 100, 1, 0, "Test accuracy of the classifier by which samples are judged."
    ),
    "geodesic_error": Quantity(
        "Geodesic error",
        "×10⁻²",
        100,
        2,
        -1,
        "Mean distance along the first shape from where a vertex of the second is taken to where it belongs, over the "
        "root of the area.",
    ),
    "geodesic_error_direct": Quantity(
        "Geodesic error, direct", "×10⁻²", 100, 2, -1, "The same of the map as it is solved for, without ZoomOut."
    ),
    "geodesic_error_start": Quantity(
        "Geodesic error, start", "×10⁻²", 100, 2, -1, "The same before the pair's network was trained, with ZoomOut."
    ),
    "geodesic_error_truth": Quantity(
        "Geodesic error, true map", "×10⁻²", 100, 2, 0, "The same of the true map at the size of the maps."
    ),
    "mask_contrast": Quantity(
        "Mask, far over near", "×", 1, 2, 1, "Mean of the mask far from the diagonal over that near it."
    ),
    "none_over_diffusion": Quantity(
        "No mask over distilled", "×", 1, 2, 1, "Error without a mask over that with the distilled one, least weight."
    ),
    "laplacian_over_diffusion": Quantity(
        "Laplacian over distilled", "×", 1, 2, 1, "Error with the Laplacian mask over that with the distilled one."
    ),
    "resolvent_over_diffusion": Quantity(
        "Resolvent over distilled", "×", 1, 2, 1, "Error with the resolvent mask over that with the distilled one."
    ),
    "diffusion_over_best": Quantity(
        "Distilled over best", "×", 1, 2, -1, "Error of the distilled mask over the best of the others, best weights."
    ),
    "weight_spread_diffusion": Quantity(
        "Spread over weights", "×", 1, 2, -1, "Error of the distilled mask at its worst weight over that at its best."
    ),
    "transfer_gain": Quantity(
        "Gain on ellipsoids", "×", 1, 2, 1, "Error without a mask over that with it, on shapes of another kind."
    ),
    "match_seconds": Quantity("Matching", "s", 1, None, -1, "Wall-clock time of a pair's fit."),
    "pck": Quantity(
        "PCK@0.1", "%", 100, 2, 1, "Share of points found within a tenth of the longer side of the thing's box."
    ),
    "pck_start": Quantity("PCK, start", "%", 100, 2, 0, "The same of the student as it began."),
    "pck_distilled": Quantity("PCK, before refinement", "%", 100, 2, 1, "The same before refinement."),
    "pck_teachers": Quantity("PCK, teachers", "%", 100, 2, 0, "The same of the teachers' concatenated features."),
    "pck_geometry": Quantity("PCK, denoiser", "%", 100, 2, 0, "The same of the denoising network's features."),
    "pck_semantics": Quantity("PCK, semantics", "%", 100, 2, 0, "The same of the other teacher's features."),
    "similarity_correlation": Quantity(
        "Similarity, correlation", "", 1, 3, 1, "Correlation of the student's and the teachers' similarity maps."
    ),
    "pck_over_teachers": Quantity("PCK over teachers", "points", 100, 2, 1, "PCK of the student less its teachers'."),
    "pair_gain": Quantity("Speed of a pair", "×", 1, 1, 1, "The teachers' time of a pair over the student's."),
    "pair_ms": Quantity("Time of a pair", "ms", 1, None, -1, "Median time of the features of two images."),
    "pair_ms_teachers": Quantity("Time of a pair, teachers", "ms", 1, None, 0, "The same of the teachers."),
    "psnr_views": Quantity(
        "PSNR, unseen views", "dB", 1, 2, 1, "Peak signal-to-noise ratio (RGB, peak 255) on views never trained on."
    ),
    "psnr_stale": Quantity(
        "PSNR, old field", "dB", 1, 2, 1, "Of the field before a move, on views of the moved scene."
    ),
    "psnr_moved": Quantity("PSNR, moved", "dB", 1, 2, 1, "The same after the thing's part of the field was moved."),
    "psnr_gain_of_move": Quantity("Gain of the move", "dB", 1, 2, 1, "PSNR after the move less that before it."),
    "psnr_updated": Quantity("PSNR, updated", "dB", 1, 2, 1, "The same after what lies near was fitted again."),
    "depth_error": Quantity("Depth error", "mm", 1, 2, -1, "Mean distance of rendered and true depth on unseen views."),
    "normal_error": Quantity(
        "Normal error", "°", 1, 1, -1, "Mean angle between rendered and true normals on unseen views."
    ),
    "separation": Quantity(
        "Separation", "", 1, 3, 1, "Mean cosine of rendered features within things, less that between things."
    ),
    "antipodal": Quantity(
        "Grasps that hold", "%", 100, 1, 1, "Share of chosen grasps whose two contacts truly lie in the friction cone."
    ),
    "antipodal_score": Quantity(
        "Grasps that hold, by score", "%", 100, 1, 0, "The same of those that the score chooses."
    ),
    "antipodal_gain": Quantity("Gain over the score", "points", 100, 1, 1, "The difference of the two."),
    "free": Quantity("Free grasps", "%", 100, 1, 1, "Share of chosen grasps whose gripper truly touches nothing else."),
    "grasped": Quantity("Feasible", "%", 100, 1, 0, "Share of proposals in which a grasp was found feasible."),
    "gaussians": Quantity("Gaussians", "", 1, None, -1, "Of the field, after density control.", prefixes=True),
    "moved_gaussians": Quantity("Gaussians moved", "", 1, None, 0, "Those found to be the moved thing's."),
    "affinity_error": Quantity(
        "Affinity error", "", 1, None, -1, "Mean square of the difference of regions' cosines to the teacher's."
    ),
    "evidence_error": Quantity(
        "Evidence error", "", 1, 3, -1, "Mean difference of an image's mean logits to the teacher's."
    ),
    "teachers_differ": Quantity("Teachers differ", "%", 100, 1, 0, "Share of test pixels that they label differently."),
    "psnr_teacher": Quantity("PSNR, teacher", "dB", 1, 2, 0, "The same of the teacher."),
    "psnr_to_teacher": Quantity(
        "PSNR to the teacher", "dB", 1, 2, 1, "The same, with the teacher's own pictures as the truth."
    ),
    "share_to_teacher": Quantity(
        "Steps to the teacher",
        "%",
        100,
        0,
        -1,
        "Share of the steps after which the student is within 1 dB of its teacher on two unseen views; all of them "
        "where it never is.",
    ),
    "psnr_gain": Quantity("Gain over bicubic", "dB", 1, 2, 1, "PSNR above that of bicubic interpolation."),
    "ap": Quantity(
        "AP",
        "%",
        100,
        2,
        1,
        "Average precision of boxes: mean over intersections over union of 0.5 to 0.95 and over the classes (COCO).",
    ),
    "ap50": Quantity("AP50", "%", 100, 2, 1, "The same where a box is right from an intersection over union of 0.5."),
    "ap75": Quantity("AP75", "%", 100, 2, 1, "The same from 0.75."),
    "ap_base": Quantity("AP, base classes", "%", 100, 2, 1, "AP of the classes whose boxes were trained on."),
    "ap_new": Quantity("AP, new classes", "%", 100, 2, 1, "AP of the classes of which no box was trained on."),
    "ap50_base": Quantity("AP50, base classes", "%", 100, 2, 1, "AP50 of the classes whose boxes were trained on."),
    "ap50_new": Quantity("AP50, new classes", "%", 100, 2, 1, "AP50 of the classes of which no box was trained on."),
    "recall_base": Quantity("Recall, base classes", "%", 100, 1, 1, "True boxes of known classes that proposals find."),
    "recall_new": Quantity("Recall, new classes", "%", 100, 1, 1, "True boxes of new classes that proposals find."),
    "ap_small": Quantity("AP, small", "%", 100, 2, 1, "AP of boxes below 32 x 32 pixels of the image's own size."),
    "ap_medium": Quantity("AP, medium", "%", 100, 2, 1, "AP of boxes of 32 x 32 to 96 x 96 pixels."),
    "ap_large": Quantity("AP, large", "%", 100, 2, 1, "AP of larger boxes."),
    "ap_bev": Quantity(
        "AP from above",
        "%",
        100,
        2,
        1,
        "Average precision at 40 recalls (KITTI) of boxes in space, turned and seen from above; mean over the classes.",
    ),
    "ap_3d": Quantity("AP in space", "%", 100, 2, 1, "The same by the volume that boxes share."),
    "effective_queries": Quantity(
        "Queries that count", "", 1, 1, 0, "To how many equal ones the weights of the last step's queries amount."
    ),
    "neighbour_agreement": Quantity(
        "Shared neighbours",
        "%",
        100,
        1,
        1,
        "Of a row's nearest in the teacher's features, the share that are among its nearest in the student's.",
    ),
    "edge_spread": Quantity(
        "Spread of edges", "", 1, 3, 1, "Standard deviation of the teacher's encoded edges; 0: they became a constant."
    ),
    "exact": Quantity(
        "Exact answers", "%", 100, 2, 1, "Answers that the network writes word by word as they are right."
    ),
    "exact_teacher": Quantity("Exact answers, teacher", "%", 100, 2, 1, "The same of the large model."),
    "invented": Quantity(
        "Invented", "%", 100, 2, -1, "Of the things asked for that are not in the image, the share said to be there."
    ),
    "invented_teacher": Quantity("Invented, teacher", "%", 100, 2, -1, "The same of the large model."),
    "caption_hallucination": Quantity(
        "Hallucinated in captions",
        "%",
        100,
        2,
        -1,
        "Of the things named in captions that the network writes, the share that is not in the image.",
    ),
    "margin_over_teacher": Quantity(
        "Margin over the teacher's",
        "nats",
        1,
        3,
        1,
        "How much more probable than a wrong answer the right one is, less the same of the teacher; mean.",
    ),
    "expert_balance": Quantity(
        "Balance of experts", "", 1, 3, -1, "1 where all experts have equal load, up to their number."
    ),
    "dropped_routes": Quantity(
        "Dropped routes",
        "%",
        100,
        2,
        -1,
        "Of the ways of tokens to experts in training, those for which there is no room.",
    ),
    "parameters_kept": Quantity("Parameters left", "%", 100, 1, -1, "Share of the parameters that pruning leaves."),
    "multiply_adds_kept": Quantity(
        "Multiply-adds left", "%", 100, 1, -1, "Share of the multiply-adds that pruning leaves."
    ),
    "scale_ratio": Quantity(
        "Ratio of scales", "", 1, 2, 1, "Mean size of batch norm's protected scales over that of the others."
    ),
    "compact_error": Quantity(
        "Compact against masked", "", 1, None, -1, "The largest difference of their outputs on four images."
    ),
    "gam_share": Quantity(
        "Gradient's share", "%", 1, 2, 0, "Of the absolute gradient, the share of the part that distillation drives."
    ),
    "dsi_cosine": Quantity(
        "Cosine", "", 1, 3, 1, "Of the detector's projected map and the teacher's, mean over the last epoch."
    ),
    "gam_epochs": Quantity(
        "Epochs to the band", "", 1, 0, -1, "The first epoch whose gradient's share was within the band."
    ),
    "accuracy_std": Quantity(
        "Accuracy, spread",
        "points",
        100,
        2,
        -1,
        "Standard deviation of the accuracy over the networks that were trained.",
    ),
    "improvement_over_random": Quantity(
        "Gain over random", "points", 100, 2, 1, "Accuracy above that of as many random real images."
    ),
    "gain_over_scratch": Quantity(
        "Gain over untrained", "points", 100, 2, 1, "Accuracy above that of backbones that were not pre-trained."
    ),
    "accuracy_random": Quantity(
        "Accuracy, random", "%", 100, 2, 0, "The same of networks trained on as many random real images."
    ),
    "accuracy_full": Quantity("Accuracy, all data", "%", 100, 2, 0, "The same of a network trained on all real data."),
    "accuracy_scratch": Quantity(
        "Accuracy, untrained", "%", 100, 2, 0, "The same of backbones that were not pre-trained."
    ),
    "accuracy_scratch_std": Quantity(
        "Accuracy, untrained, spread", "points", 100, 2, -1, "Standard deviation of that over the backbones."
    ),
    "test_loss": Quantity(
        "Regression, unseen",
        "",
        1,
        None,
        -1,
        "Squared error of the representations of unseen real images, as ridge regression on the set predicts them.",
    ),
    "label_agreement": Quantity(
        "Label agreement", "%", 100, 1, 1, "Share of the soft labels whose largest entry is at the image's class."
    ),
    "accuracy_unaugmented": Quantity(
        "Accuracy, plain", "%", 100, 2, 1, "The same of networks trained without augmentation."
    ),
    "accuracy_random_unaugmented": Quantity(
        "Accuracy, random, plain", "%", 100, 2, 0, "Of random real images, without augmentation."
    ),
    "lrs": Quantity(
        "LRS",
        "",
        1,
        3,
        1,
        "Label-robust score of DD-Ranking, 0 to 1: hard labels against all data, and the gain over random images.",
    ),
    "ars": Quantity(
        "ARS",
        "",
        1,
        3,
        1,
        "Augmentation-robust score of DD-Ranking, 0 to 1: the gain over random images, with augmentation and without.",
    ),
    "hlr": Quantity(
        "HLR", "points", 100, 2, -1, "Accuracy of all real data above that of the set, both with hard labels."
    ),
    "ior": Quantity("IOR", "points", 100, 2, 1, "Accuracy of the set above that of as many random real images."),
    "accuracy_linear": Quantity(
        "Linear probe", "%", 100, 2, 1, "Accuracy of a linear classifier on the frozen features."
    ),
    "accuracy_knn": Quantity(
        "Nearest neighbours", "%", 100, 2, 1, "Accuracy of nearest neighbours in the frozen features."
    ),
    "accuracy_fine_tuned": Quantity(
        "Fine-tuned", "%", 100, 2, 1, "Accuracy of a copy that was fine-tuned with labels."
    ),
    "attention_nmi": Quantity(
        "Attention NMI",
        "",
        1,
        3,
        0,
        "Mutual information of query and key positions in the last block, 0 to 1; 0 is collapsed attention.",
    ),
    "attention_distance": Quantity(
        "Attention distance", "px", 1, 1, 0, "Mean distance from query to key in the last block."
    ),
    "nll": Quantity(
        "NLL",
        "nats",
        1,
        3,
        -1,
        "Negative log-likelihood: how surprised the model is by the right class, on average; lower is better.",
    ),
    "accuracy_omitted": Quantity(
        "Accuracy, omitted", "%", 100, 2, 1, "Share right among test samples of the classes that the student never saw."
    ),
    "accuracy_seen": Quantity(
        "Accuracy, seen", "%", 100, 2, 1, "Share right among test samples of the classes that the student was taught."
    ),
    "auc": Quantity(
        "AUC", "%", 100, 2, 1, "Area under the ROC curve: how often a positive is ranked above a negative."
    ),
    "nmi": Quantity("NMI", "%", 100, 2, 1, "Normalised mutual information of clusters and classes."),
    "ari": Quantity("ARI", "%", 100, 2, 1, "Adjusted Rand index of clusters and classes; 0 is chance."),
    "perplexity": Quantity(
        "Perplexity",
        "",
        1,
        2,
        -1,
        "Of tokens: as if the model chose among so many equally likely ones each time; e to the power of the NLL.",
    ),
    "ece": Quantity(
        "ECE",
        "%",
        100,
        2,
        -1,
        "Expected calibration error: how far the model's confidence is from its accuracy; 0 is as sure as it is right.",
    ),
    "brier": Quantity(
        "Brier",
        "",
        1,
        3,
        -1,
        "Brier score: squared distance of the probabilities from the right answer, 0 to 2; lower is better.",
    ),
    "aurc": Quantity(
        "AURC",
        "×10⁻³",
        1000,
        1,
        -1,
        "Error rate when the least confident answers are withheld, averaged over how many are; lower is better.",
    ),
    "step_relative": Quantity(
        "Step",
        "×",
        1,
        2,
        -1,
        "Time of a training step (CPU time on a CPU; without the optimiser), as a multiple of the reference's in the "
        "same group.",
    ),
    "step_memory_relative": Quantity(
        "Step memory",
        "×",
        1,
        2,
        -1,
        "The most that a training step allocates beyond what was allocated before, as a multiple of the reference's.",
    ),
    "parameters": Quantity("Parameters", "", 1, None, -1, "Numbers that the model holds.", prefixes=True),
    "multiply_adds": Quantity(
        "Multiply-adds",
        "",
        1,
        None,
        -1,
        "Multiplications with addition for one sample: the work of one prediction.",
        prefixes=True,
    ),
    "mean_multiply_adds": Quantity(
        "Multiply-adds, mean",
        "",
        1,
        None,
        -1,
        "Multiplications with addition that were done for a test sample, on average, by a network that skips work.",
        prefixes=True,
    ),
    "speedup": Quantity(
        "Speed", "×", 1, 2, 1, "Time of the dense network over this one's, on the same batch, in turns."
    ),
    "learners_share": Quantity(
        "Learners that ran", "%", 100, 1, -1, "Cost of the learners that ran for test samples over the cost of all."
    ),
    "token_spread": Quantity(
        "Spread over tokens", "", 1, 3, 0, "Standard deviation over tokens of the share of learners that they had."
    ),
    "sample_spread": Quantity(
        "Spread over samples", "", 1, 3, 0, "Standard deviation over samples of the mean share of learners."
    ),
    "gate_accuracy": Quantity(
        "Gates", "%", 100, 1, 1, "How often a gate chose the number of learners that its label says, on test data."
    ),
    "gate_gain": Quantity(
        "Gates over majority", "points", 100, 1, 1, "The same, less the share of the most frequent label."
    ),
    "latency_ms": Quantity(
        "Latency",
        "ms",
        1,
        None,
        -1,
        "Median time of one prediction, one sample at a time (one CPU thread, or the GPU).",
    ),
    "file_bytes": Quantity(
        "File size", "B", 1, None, -1, "What the saved product takes on disk, in bytes.", prefixes=True
    ),
    "bits_per_weight": Quantity(
        "Bits a weight", "", 1, 2, -1, "Length of a code of fixed length, mean over the quantised weights."
    ),
    "huffman_bits": Quantity(
        "Bits, Huffman", "", 1, 2, -1, "Mean length of one Huffman code for all quantised weights."
    ),
    "compression": Quantity(
        "Compression",
        "×",
        1,
        2,
        1,
        "Size of the float32 weights over that of codes, scales and weights that are not quantised.",
    ),
    "bytes_per_image": Quantity(
        "Bytes an image", "B", 1, 1, -1, "Mean length of what is sent for an image; of JPEG without headers and tables."
    ),
    "ideal_bytes": Quantity(
        "Bytes, ideal", "B", 1, 1, -1, "The same as the prior has it, before any coder: bits over eight."
    ),
    "encode_ms": Quantity("Encoding", "ms", 1, None, -1, "Median time of one image to the string that is sent."),
    "device_parameters": Quantity(
        "Parameters, device", "", 1, None, -1, "Numbers that the device's part of the network holds.", prefixes=True
    ),
    "parameters_share": Quantity(
        "Parameters, share", "%", 100, 1, -1, "Parameters over those of the network that it was derived from."
    ),
    "perturbation": Quantity(
        "Perturbation",
        "",
        1,
        None,
        -1,
        "Largest change of an entry of a layer's weight, mean over the factorised layers.",
    ),
    "step_ms": Quantity(
        "Step time", "ms", 1, None, -1, "Time of a training step (CPU time on a CPU; without the optimiser)."
    ),
    "step_ratio": Quantity(
        "Step / plain",
        "×",
        1,
        2,
        -1,
        "Time of a training step over a plain cross-entropy step of the same student, taken in turns.",
    ),
    "step_bytes": Quantity(
        "Step memory",
        "B",
        1,
        None,
        -1,
        "The most that torch holds at a time in a training step, beyond what was allocated before.",
        True,
    ),
    "step_whole_teacher": Quantity(
        "Step, whole teacher",
        "×",
        1,
        2,
        1,
        "Time of a step if the teacher ran all its blocks, over that of the step as it is.",
    ),
    "step_unmasked_teacher": Quantity(
        "Step, unmasked teacher",
        "×",
        1,
        2,
        1,
        "The same if the teacher ran all its blocks on all patches.",
    ),
    "step_unpruned": Quantity(
        "Step, unpruned",
        "×",
        1,
        2,
        1,
        "Time of a step in which the student drops no patches, over that of the step as it is.",
    ),
    "train_seconds": Quantity("Training time", "s", 1, None, -1, "Wall-clock time of the training."),
    "distil_seconds": Quantity("Making", "s", 1, None, -1, "Wall-clock time of making the images."),
    "distil_seconds_per_iteration": Quantity(
        "Making, an iteration", "s", 1, None, -1, "Wall-clock time of one iteration."
    ),
    "distil_iterations": Quantity("Iterations", "", 1, None, 0, "Steps in which the images were learned."),
    "distil_peak_mb": Quantity("Peak memory", "B", 1e6, None, -1, "The peak of an iteration.", prefixes=True),
    "stored_images": Quantity("Images", "", 1, None, -1, "Images that the set stores."),
    "stored_mb": Quantity(
        "Size", "B", 1e6, None, -1, "Images and labels of every kind, as they are stored.", prefixes=True
    ),
    "label_mb": Quantity("Labels", "B", 1e6, None, -1, "The soft labels' part of the size.", prefixes=True),
    "out_of_range_pixels": Quantity("Pixels out of range", "%", 100, 1, 0, "Share of the pixels below 0 or above 1."),
    "run_seconds": Quantity(
        "Whole run",
        "s",
        1,
        None,
        -1,
        "Wall-clock time of the whole run, with its teacher's training where that was not already there.",
    ),
}


def quantity(name: str, largest: float = 0.0) -> Quantity:
    """How the figure of this name is shown, in a unit for values up to `largest`; `val/accuracy` as `accuracy`; an
    unknown name as its kind, or as itself to three digits."""
    base = name.rsplit("/", 1)[-1]
    return _KNOWN.get(base, _alike(base)).suited_to(largest)


def known(name: str) -> bool:
    """Whether reports know the figure of this name, itself or by its kind."""
    base = name.rsplit("/", 1)[-1]
    return base in _KNOWN or bool(_alike(base).unit)


def known_names() -> list[str]:
    """The figures that reports know by their names."""
    return list(_KNOWN)


def _alike(name: str) -> Quantity:
    """A figure that is known by its kind alone: `accuracy_NAME`, `NAME_accuracy` and `miou_NAME` are shares,
    `…_seconds` and `…_mb` have their units."""
    kind, _, what = name.partition("_")
    if kind == "accuracy" and what.endswith("_std"):
        return replace(_KNOWN["accuracy_std"], title=f"Accuracy, {what.removesuffix('_std').replace('_', ' ')}, spread")
    if kind == "accuracy" and what:
        return Quantity(f"Accuracy, {what.replace('_', ' ')}", "%", 100, 2, 1)
    if kind == "miou" and what:
        return replace(_KNOWN["miou"], title=f"Mean IoU, {what.replace('_', ' ')}")
    if kind == "ap" and what and not name.startswith("ap_class_"):
        return replace(_KNOWN["ap"], title=f"AP, {what.replace('_', ' ')}")
    if kind == "ap50" and what:
        return replace(_KNOWN["ap50"], title=f"AP50, {what.replace('_', ' ')}")
    if kind == "mask" and what.startswith("ap"):
        plain = _alike(what) if what not in _KNOWN else _KNOWN[what]
        return replace(plain, title=f"Mask {plain.title}", meaning=plain.meaning.replace("boxes", "masks"))
    if name.startswith("ap_class_"):
        return replace(_KNOWN["ap"], title=f"AP, {name.removeprefix('ap_class_').replace('_', ' ')}")
    if kind == "exact" and what:
        return replace(_KNOWN["exact"], title=f"Exact answers, {what.replace('_', ' ')}")
    if kind == "iou" and what:
        return Quantity(
            f"IoU, {what.replace('_', ' ')}",
            "%",
            100,
            2,
            1,
            "Intersection over union of predicted and true pixels of this class.",
        )
    if what == "accuracy":
        return Quantity(f"Accuracy, {kind}", "%", 100, 2, 1)
    for end, unit in (("_seconds", "s"), ("_mb", "MB")):
        if name.endswith(end):
            return Quantity(name.removesuffix(end).replace("_", " ").capitalize(), unit, 1, None, -1)
    return Quantity(name.replace("_", " ").capitalize())


def in_reading_order(names: set[str]) -> list[str]:
    """Known figures in their usual order (quality, calibration, cost), other accuracies after theirs, then the rest by
    name."""
    known = list(_KNOWN)

    def place(name: str) -> float:
        return (
            known.index(name)
            if name in _KNOWN
            else known.index("accuracy_std") + 0.5
            if name.startswith("accuracy_")
            else len(known)
        )

    return sorted(names, key=lambda n: (place(n), n))
