"""``nnssl_split``: makes a label-budget data set from a fully labeled one."""

from __future__ import annotations

import argparse


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv)

    from nnunetv2.configuration import default_num_processes

    from nnssl.dataset.budget import plan_budget
    from nnssl.dataset.budget_dataset import make_budget_dataset
    from nnssl.dataset.groups import source_groups
    from nnssl.dataset.source import open_source

    source = open_source(
        args.source,
        channel_names=args.channel_names,
        labels_file=args.labels,
        num_processes=args.np or default_num_processes,
    )
    groups = source_groups(source.location, source.images, args.groups, args.group_regex, source.left_out)
    budget = plan_budget(
        source,
        labeled=args.labeled,
        labeled_cases=args.labeled_cases or (),
        unlabeled=args.unlabeled,
        validation=args.validation,
        test=args.test,
        test_cases=args.test_cases or (),
        seed=args.seed,
        groups=groups,
    )
    made = make_budget_dataset(
        source,
        budget,
        dataset_id=args.d,
        name=args.n,
        seed=args.seed,
        groups=groups,
        hidden_labels=args.hidden_labels,
        copy=args.copy,
        overwrite=args.overwrite,
    )
    print(f"{made.folder}: {budget.summary()}")
    print(f"Labeled: {' '.join(budget.labeled)}")
    for remark in made.remarks:
        print(remark)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnssl_split",
        description="Makes a label-budget data set: a few cases of a fully labeled source stay labeled, the others "
        "become unlabeled. Files are linked; hidden labels do not get into the data set.",
    )
    parser.add_argument(
        "source",
        help="a folder with images/ and labels/ (optional: split.json with train and test, images_unlabeled/, "
        "labels.json), or an nnU-Net raw data set: id, name or folder",
    )
    parser.add_argument("-d", type=int, required=True, metavar="ID", help="id of the new data set (1 to 999)")
    parser.add_argument("-n", required=True, metavar="NAME", help="name of the new data set, without DatasetXXX_")
    number = parser.add_mutually_exclusive_group(required=True)
    number.add_argument(
        "--labeled",
        type=_count,
        metavar="N",
        help="number of labeled cases; for one seed, smaller sets are parts of larger ones. With groups whole groups "
        "are taken, until there are at least N cases",
    )
    number.add_argument("--labeled-cases", nargs="+", metavar="CASE", help="labeled cases (or groups) by name instead")
    parser.add_argument(
        "--unlabeled",
        type=_count,
        metavar="N",
        help="keep N unlabeled cases and leave the others out; smaller sets are parts of larger ones (default: all)",
    )
    parser.add_argument("--seed", type=_count, default=0, help="seed of the draw of labeled cases (default: 0)")
    parser.add_argument(
        "--validation",
        type=_count,
        default=0,
        metavar="N",
        help="N further labeled cases to validate on; they make up fold 0 with the labeled ones (default: 0)",
    )
    test = parser.add_mutually_exclusive_group()
    test.add_argument(
        "--test",
        type=_count,
        default=0,
        metavar="N",
        help="set N cases apart as test cases, the same for every seed, if the source has no test part",
    )
    test.add_argument("--test-cases", nargs="+", metavar="CASE", help="test cases by name instead")
    parser.add_argument(
        "--labels", metavar="FILE", help="JSON file with the labels entry of dataset.json (default: labels.json there)"
    )
    parser.add_argument(
        "--channel-names",
        nargs="+",
        metavar="NAME",
        help="name per channel, such as CT, or T1 FLAIR; CT is normalized as CT",
    )
    groups = parser.add_mutually_exclusive_group()
    groups.add_argument(
        "--groups",
        metavar="FILE",
        help="JSON file {case: patient}; a patient stays together (default: groups.json there)",
    )
    groups.add_argument(
        "--group-regex",
        metavar="REGEX",
        help=r"regular expression at the start of the case name whose first group is the patient: (patient\d+)_",
    )
    parser.add_argument(
        "--hidden-labels",
        metavar="FOLDER",
        help="collect the labels of unlabeled and test cases in this folder, outside nnU-Net's folders "
        "(default: they stay at the source only); a folder of its own for each data set",
    )
    parser.add_argument("--copy", action="store_true", help="copy files instead of linking them")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a data set that nnssl_split made, and its hidden labels"
    )
    parser.add_argument("-np", type=_count, metavar="N", help="processes for reading labels (default: nnU-Net's)")
    return parser


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
    return int(text)
