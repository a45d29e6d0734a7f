"""Every setting of a run, with its default. The files in `configs/` state only what they change.

Certainty of a default, where it stands for a fact of the paper:
S stated by the authors, F shown in their figure, L from the group's later code, G a guess.
"""

import ml_collections
from ml_collections import config_dict


def default_config() -> ml_collections.ConfigDict:
    """The paper's method on LiTS-like folders."""
    config = ml_collections.ConfigDict()
    config.seed = 0  # of the weights, batches, augmentation

    config.data = data = ml_collections.ConfigDict()
    data.root = ""  # folder of scans; "" makes the phantom, where that has any
    data.organ = "liver"
    data.label_values = ()  # label values that count as the organ; () takes the layout's
    # Label value of voxels that nobody annotated; None takes the layout's, nnU-Net's "ignore".
    data.ignore_value = config_dict.placeholder(int)
    data.store = ""  # slice store; "" is WORKDIR/store
    data.size = 256  # side of the stored slices, pixels (S)
    data.resize = "fit"  # "fit" keeps proportions and pads, "stretch" fills the square, "paper"
    #                      fills it in the authors' arithmetic (S)
    data.central_fraction = 1.0  # central part of each scan's slices; the authors keep 0.3 (S)
    data.slice_range = (0.0, 1.0)  # or a part by fractions of the scan's height, feet to head
    data.default_orientation = ""  # of NIfTI files that know none: how their axes run, such as LAS;
    #                                "" leaves it to nibabel (LiTS 28 to 47 know none)
    data.split = (91, 13, 27)  # train, val, test, by patient (G)
    data.patient = ""  # a regular expression that finds the patient in a scan's name, such as
    #                    "^[^_]+" in p01_portal; "" takes each scan for another patient
    data.split_file = ""  # a split.json to use instead of drawing one
    data.labelled_slices = 50  # k; 0 uses every positive slice (S: 5, 50, 100)
    data.labels_file = ""  # a labels.json to use instead of drawing one
    data.seed = 0  # of the split
    data.labels_seed = 0  # of the draw of labelled slices
    data.workers = 0  # threads that prepare; 0 is one per core, 8 at most
    data.phantom = phantom = ml_collections.ConfigDict()
    phantom.scans = 0  # how many there are; 0 is no phantom
    phantom.unlabelled = 0  # how many of them get no mask
    phantom.domain = "portal"  # or "unenhanced"
    phantom.seed = 0  # of the patients

    config.input = inputs = ml_collections.ConfigDict()
    inputs.window = (-160.0, 240.0)  # HU (S)
    inputs.scaling = "window"  # to [0, 1]; "paper" is the authors' (x + 3055) / 8866 in float16 (S)
    inputs.normalise = "minmax"  # per slice to [0, 1] (L); "unit" scales the window, "sam" adds
    #                              SAM's mean and standard deviation

    config.model = model = ml_collections.ConfigDict()
    model.system = "sam_mix"  # what is trained; or one it is compared with: unet, nnunet, multimix,
    #                           transunet, prompted_sam
    model.sam = "vit_b"  # mini, vit_b, vit_l, vit_h (L)
    model.image_size = 1024  # side of SAM's input, pixels (L)
    model.lora_rank = 8  # (S)
    model.lora_targets = ("q", "v")  # (L)
    model.classifier = "resnet38"  # (F for ResNet-38, G for model A1); resnet18/34/50, mini
    model.classifier_stride = 32  # (F); 8 is the dilated form
    model.freeze_batch_norm = False  # keep the classifier's running statistics as loaded
    model.mask_choice = "argmax_iou"  # of three (F/G); "index" takes one of the three, "single"
    #                                   SAM's single-mask token
    model.mask_index = 0  # which of the three "index" takes
    model.prompt = "none"  # of prompted_sam: "points" of the true mask, in training and scoring
    model.widths = ()  # channels of each level of unet, nnunet, multimix; () takes the published
    model.transunet = "r50_vit_b16"  # or "mini"
    model.sam_weights = ""  # file of python -m convert.sam; "" starts from random values
    model.classifier_weights = ""  # file of python -m convert.classifier; "" as above
    model.start_from = ""  # a trained workdir whose model a run starts from, in place of the files
    model.dtype = "float32"  # compute dtype of the networks; parameters stay float32
    model.remat = "none"  # what the backward pass computes again instead of keeping it: "dots", all
    #                       but products with weight matrices; "blocks", all within a block of
    #                       either network
    model.query_chunk = 128  # queries that attend at a time in SAM's global blocks; not where
    #                          cuDNN's fused kernel serves, on NVIDIA GPUs in bfloat16

    config.cam = cam = ml_collections.ConfigDict()
    cam.method = "grad_cam"  # (F); "cam" is the plain one, which keeps negative evidence
    cam.layer = "last"  # (F); a stage of the classifier, such as "b5" or "layer3", by gradient
    cam.threshold = 0.2  # of the CAM's peak (F)
    cam.component = "largest"  # (F); "peak" holds the peak, "all" keeps every component
    cam.fusion = "add"  # CAM mask added to the image embeddings (F for ⊕, G for add); "concat" with
    #                     a 1×1 projection that starts as the identity; "none"
    cam.soft = False  # fuse the CAM's values instead of its binary mask
    cam.box = True  # the CAM's box prompts the decoder (S)

    config.loss = loss = ml_collections.ConfigDict()
    loss.classifier = "cross_entropy"  # (L); "focal" with α .25, γ 2
    loss.classification = 1.0  # weight (L)
    loss.segmentation = 0.5  # weight (L)
    loss.dice_smooth = 1.0  # (L)
    loss.bce = 0.0  # weight of cross-entropy beside Dice
    loss.iou = 0.0  # weight of the IoU head's regression
    loss.negatives = False  # slices known not to show the organ train masks, which are empty; for
    #                         systems that have no classifier to learn it

    config.train = train = ml_collections.ConfigDict()
    # What is trained, by regular expressions on parameter paths; the rest is frozen (L).
    train.trainable = (
        r"sam/image_encoder/.*/lora_.*",
        r"sam/prompt_encoder/.*",
        r"sam/mask_decoder/.*",
        r"(classifier|fusion)/.*",
    )
    train.epochs = 10.0  # (S: 90% fewer than the baselines' 100)
    train.steps = 0  # overrides epochs
    train.batch_labelled = 1  # slices that train both tasks (L: batch 1)
    train.batch_unlabelled = 1  # slices that train the classifier alone
    train.accumulate = 1  # parts of a batch that go one after another; BatchNorm sees one at a time
    train.optimiser = "adam"  # (L); "sgd" with Nesterov momentum 0.99, as nnU-Net
    train.adam_b2 = 0.999  # decay of Adam's second moment
    train.learning_rate = 1e-4  # (L)
    train.box = "cam"  # box that prompts the decoder in training (S); "gt" is the true mask's
    train.classifier_warmup_steps = 0  # steps in which only the classifier learns
    train.schedule = "constant"  # (L); "cosine" decays to zero, "poly" by the power 0.9 (nnU-Net)
    train.warmup_steps = 0
    train.weight_decay = 0.0
    train.clip_norm = 0.0  # global gradient norm; 0 does not clip
    train.augment = False  # random affine and intensity changes on the device
    train.augmentation = "standard"  # which; "nnunet" is stronger and mirrors
    train.points = 1  # that prompt prompted_sam in training

    # Not in the paper, and off: a teacher, the moving average of the trained parameters, segments
    # weak views of slices without masks, and the model learns its confident pixels on strong ones.
    config.consistency = consistency = ml_collections.ConfigDict()
    consistency.weight = 0.0
    consistency.ema = 0.99  # share of the teacher that a step keeps
    consistency.confidence = 0.9  # teacher's probability from which a pixel counts
    consistency.start_step = 0  # the teacher follows from the start and teaches from here
    consistency.ramp_steps = 100  # over which the weight then grows

    # Promptable pretraining on procedural scenes (--mode=pretrain).
    config.pretrain = pretrain = ml_collections.ConfigDict()
    pretrain.images = 8  # in a step
    pretrain.prompts = 6  # shapes of an image that are prompted, half by a box and half by a point
    pretrain.rounds = 2  # of prompts: the first and then corrections
    pretrain.coarse_steps = 0  # the first of train.steps, at half of model.image_size
    pretrain.held_out = 128  # scenes to validate on

    # Of the system multimix; the values of its authors' code.
    config.multimix = multimix = ml_collections.ConfigDict()
    multimix.image_labels = "all"  # that train its classifier; "labelled" of slices with masks only
    multimix.confidence = 0.7  # of its classifier, from which its own answer is a label
    multimix.unsupervised = 0.25  # weight of these labels' loss
    multimix.kl = 0.01  # weight of the divergence between masks of labelled and other slices
    multimix.kl_form = "published"  # which is 0 whatever the masks; "bernoulli" is what it meant

    config.evaluate = evaluate = ml_collections.ConfigDict()
    evaluate.part = "test"  # train, val or test
    evaluate.root = ""  # evaluate every labelled scan of this folder instead
    evaluate.label_values = ()  # of that folder's label files; () takes the layout's
    evaluate.ignore_value = config_dict.placeholder(int)  # of them too, as data.ignore_value
    evaluate.scans = 0  # how many of them that show the organ, drawn by seed (S: 20); 0 takes all
    evaluate.seed = 0  # of the draw of evaluate.scans
    evaluate.protocols = ("cam", "gt_box", "none")
    evaluate.points = 1  # of the true mask that prompt under gt_points
    evaluate.gate = True  # slices that the classifier calls negative get an empty mask
    evaluate.component = "all"  # "largest" keeps of a scan's mask the largest component, in 3D
    evaluate.nsd_tolerance = 2.0  # mm by which a surface may be off and still count
    evaluate.save_masks = False  # keep the masks that are scored, as NIfTI on the scans' own grids
    evaluate.batch = 8  # slices that are predicted at a time

    config.mesh = mesh = ml_collections.ConfigDict()
    mesh.fsdp = 1  # devices over which large parameters are divided; 1 repeats them on each
    mesh.shard_frozen = False  # divide the frozen parameters too

    config.checkpoint = checkpoint = ml_collections.ConfigDict()
    checkpoint.every_steps = 100  # most that a killed run loses: saved twice as often
    checkpoint.keep = 2  # of the newest

    config.log = log = ml_collections.ConfigDict()
    log.every_steps = 10  # losses, speed and memory
    log.validate_every_steps = 100  # and after the last step
    log.profile = (0, 0)  # (start, stop) steps of which jax.profiler writes a trace; (0, 0) none
    # A misspelt field in a config file is an error, not a new field.
    return config.lock()


get_config = default_config  # the name by which --config finds a file's config
