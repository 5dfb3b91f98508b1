"""Classes of the named sets by name, and which classes two sets share: images of them are no OOD images.

A class is shared where its photographs show what the other's name says: by name, or below it in WordNet. Both figures, with
and without the images of such classes, are shown. The lists are of classes, not of images; those of Tiny ImageNet are 24 for
CIFAR-10 and 44 for CIFAR-100. CIFAR-100 is commonly taken whole against CIFAR-10, whose authors kept pickup trucks out of both
its vehicle classes; by name a pickup truck is a truck, so it stands here. Buses and streetcars are no trucks, wild cats no
"cat", and people in the clothes that Tiny ImageNet names do not make it share CIFAR-100's "woman": such images stay.
"""

from __future__ import annotations

_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
"""
_TINY_IMAGENET = """
n01443537 n01629819 n01641577 n01644900 n01698640 n01742172 n01768244 n01770393 n01774384 n01774750 n01784675
n01855672 n01882714 n01910747 n01917289 n01944390 n01945685 n01950731 n01983481 n01984695 n02002724 n02056570
n02058221 n02074367 n02085620 n02094433 n02099601 n02099712 n02106662 n02113799 n02123045 n02123394 n02124075
n02125311 n02129165 n02132136 n02165456 n02190166 n02206856 n02226429 n02231487 n02233338 n02236044 n02268443
n02279972 n02281406 n02321529 n02364673 n02395406 n02403003 n02410509 n02415577 n02423022 n02437312 n02480495
n02481823 n02486410 n02504458 n02509815 n02666196 n02669723 n02699494 n02730930 n02769748 n02788148 n02791270
n02793495 n02795169 n02802426 n02808440 n02814533 n02814860 n02815834 n02823428 n02837789 n02841315 n02843684
n02883205 n02892201 n02906734 n02909870 n02917067 n02927161 n02948072 n02950826 n02963159 n02977058 n02988304
n02999410 n03014705 n03026506 n03042490 n03085013 n03089624 n03100240 n03126707 n03160309 n03179701 n03201208
n03250847 n03255030 n03355925 n03388043 n03393912 n03400231 n03404251 n03424325 n03444034 n03447447 n03544143
n03584254 n03599486 n03617480 n03637318 n03649909 n03662601 n03670208 n03706229 n03733131 n03763968 n03770439
n03796401 n03804744 n03814639 n03837869 n03838899 n03854065 n03891332 n03902125 n03930313 n03937543 n03970156
n03976657 n03977966 n03980874 n03983396 n03992509 n04008634 n04023962 n04067472 n04070727 n04074963 n04099969
n04118538 n04133789 n04146614 n04149813 n04179913 n04251144 n04254777 n04259630 n04265275 n04275548 n04285008
n04311004 n04328186 n04356056 n04366367 n04371430 n04376876 n04398044 n04399382 n04417672 n04456115 n04465501
n04486054 n04487081 n04501370 n04507155 n04532106 n04532670 n04540053 n04560804 n04562935 n04596742 n04597913
n06596364 n07579787 n07583066 n07614500 n07615774 n07695742 n07711569 n07715103 n07720875 n07734744 n07747607
n07749582 n07753592 n07768694 n07871810 n07873807 n07875152 n07920052 n09193705 n09246464 n09256479 n09332890
n09428293 n12267677
"""
CLASSES = {
    name: tuple(words.split())
    for name, words in {"cifar10": _CIFAR10, "cifar100": _CIFAR100, "tiny-imagenet": _TINY_IMAGENET}.items()
}
"""The classes by set, in the order of the labels that `datasets` gives; of Tiny ImageNet the WordNet ids."""

SHARED: dict[tuple[str, str], dict[str, str]] = {
    ("cifar10", "cifar100"): {"truck": "pickup_truck"},
    ("cifar10", "tiny-imagenet"): {
        "frog": "n01641577 n01644900",  # bullfrog, tailed frog
        "bird": "n01855672 n02002724 n02056570 n02058221",  # goose, black stork, king penguin, albatross
        "dog": "n02085620 n02094433 n02099601 n02099712 n02106662 n02113799",  # Chihuahua to standard poodle
        "cat": "n02123045 n02123394 n02124075",  # tabby, Persian, Egyptian
        "deer": "n02423022",  # gazelle
        "automobile": "n02814533 n03100240 n03670208 n04285008",  # beach wagon, convertible, limousine, sports car
        "truck": "n03796401 n03977966",  # moving van, police van
        "ship": "n03447447 n03662601",  # gondola, lifeboat
    },
    ("cifar100", "tiny-imagenet"): {
        "aquarium_fish": "n01443537",  # goldfish
        "bear": "n02132136",  # brown bear
        "bee": "n02206856",
        "beetle": "n02165456",  # ladybug
        "bottle": "n02823428 n03937543 n03983396",  # beer, pill and pop bottle
        "bridge": "n04311004 n04366367 n04532670",  # steel arch and suspension bridge, viaduct
        "bus": "n04146614 n04487081",  # school bus, trolleybus
        "butterfly": "n02279972 n02281406",  # monarch, sulphur butterfly
        "camel": "n02437312",
        "cattle": "n02403003",  # ox
        "chair": "n04099969",  # rocking chair
        "chimpanzee": "n02481823",
        "cockroach": "n02233338",
        "crocodile": "n01698640",  # American alligator
        "elephant": "n02504458",
        "keyboard": "n03085013",
        "lamp": "n03637318",  # lampshade
        "lawn_mower": "n03649909",
        "lion": "n02129165",
        "lobster": "n01983481 n01984695",  # American and spiny lobster
        "mountain": "n09193705",  # alp
        "mushroom": "n07734744",
        "orange": "n07747607",
        "plate": "n07579787",
        "rocket": "n04008634",  # projectile, missile
        "sea": "n09428293",  # seashore
        "snail": "n01944390",
        "snake": "n01742172",  # boa constrictor
        "spider": "n01774384 n01774750",  # black widow, tarantula
        "sweet_pepper": "n07720875",  # bell pepper
        "table": "n03179701 n03201208",  # desk, dining table
        "telephone": "n03902125",  # pay-phone
        "tractor": "n04465501",
        "train": "n02917067 n03393912",  # bullet train, freight car
    },
}
"""For two sets, the classes of the first with the classes of the second (separated by blanks) that show the same."""

UNREMOVED: dict[frozenset[str], str] = {
    frozenset(("cifar10", "cars196")): "every image of cars196 shows an automobile, a class of cifar10",
    frozenset(("cifar100", "celeba")): "every image of celeba shows a person; cifar100 has baby, boy, girl, man, woman",
    frozenset(("cifar100", "lsun")): "lsun has bridges, a class of cifar100, and its test images have no labels",
    frozenset(("cifar10", "coco")): "coco's photographs show classes of cifar10, and have no single label",
    frozenset(("cifar100", "coco")): "coco's photographs show classes of cifar100, and have no single label",
    frozenset(("tiny-imagenet", "coco")): "coco's photographs show classes of tiny-imagenet, and have no single label",
    frozenset(("mnist", "svhn")): "mnist and svhn both show the digits: the classes are the same",
    frozenset(("notmnist", "omniglot")): "omniglot has alphabets with the letters of notmnist",
}
"""Sets that share classes which no list can take away; told as a note."""


def shared_classes(inside: str | None, outside: str | None) -> list[str]:
    """The classes of the set `outside` that the set `inside` has too, by their names in `outside`; [] for unknown sets."""
    found = SHARED.get((inside or "", outside or ""))
    if found is not None:
        return " ".join(found.values()).split()
    return list(SHARED.get((outside or "", inside or ""), {}))
