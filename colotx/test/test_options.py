"""Command line and file: who overrides whom, and one line for what is wrong."""

from __future__ import annotations

import os
from dataclasses import fields

from twisted.python import usage
from twisted.trial.unittest import SynchronousTestCase

from colotx.comparesettings import compareKeys
from colotx.options import Options
from colotx.settings import HostPort, Settings, keyOf


def parse(*arguments: str) -> Settings:
    options = Options()
    options.parseOptions(list(arguments))
    return options.settings


class OptionsTests(SynchronousTestCase):
    def file(self, text: str) -> str:
        path = self.mktemp()
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return f"--config={path}"

    def refused(self, *arguments: str) -> str:
        message = str(self.assertRaises(usage.UsageError, parse, *arguments))
        self.assertNotIn("\n", message)
        return message

    def test_everySettingIsAnOption(self) -> None:
        names = {row[0] for row in Options.optParameters} - {"config"}
        self.assertEqual(names, {keyOf(field.name) for field in fields(Settings)} | compareKeys())

    def test_roleAloneIsEnough(self) -> None:
        self.assertEqual(parse("--role=secondary"), Settings(role="secondary"))

    def test_commandLine(self) -> None:
        settings = parse("--role=primary", "--peer=[::1]:77", "--checkpoint-delay", "50", "--trace=yes")
        self.assertEqual(settings.peer, HostPort("::1", 77))
        self.assertEqual(settings.checkpointDelay, 50)
        self.assertIs(settings.trace, True)

    def test_file(self) -> None:
        settings = parse(
            self.file('role = "primary"\ncheckpoint-delay = 200\nqemu-arguments = ["-m", "1G"]\n')
        )
        self.assertEqual(settings.checkpointDelay, 200)
        self.assertEqual(settings.qemuArguments, ("-m", "1G"))

    def test_commandLineOverridesFile(self) -> None:
        file = self.file('role = "primary"\nvm = "a"\ncheckpoint-delay = 200\n')
        settings = parse(file, "--checkpoint-delay=20000")
        self.assertEqual((settings.vm, settings.checkpointDelay), ("a", 20000))

    def test_noRole(self) -> None:
        self.assertIn("primary, secondary", self.refused())

    def test_wrongValue(self) -> None:
        self.assertIn("checkpoint-delay", self.refused("--role=primary", "--checkpoint-delay=soon"))

    def test_unknownOption(self) -> None:
        self.assertIn("bogus", self.refused("--bogus=1"))

    def test_strayArgument(self) -> None:
        """A forgotten dash is no reason to run with a default."""
        self.assertIn("role=primary", self.refused("--role=primary", "role=primary"))

    def test_fileMissing(self) -> None:
        path = os.path.abspath(self.mktemp())
        message = self.refused(f"--config={path}")
        self.assertIn(path, message)
        self.assertIn("No such file", message)

    def test_fileIsNoToml(self) -> None:
        self.assertIn("no TOML", self.refused(self.file("role = primary")))

    def test_fileIsNoText(self) -> None:
        path = self.mktemp()
        with open(path, "wb") as file:
            file.write(b'vm = "\xff"')
        self.assertIn("no TOML", self.refused(f"--config={path}"))

    def test_fileWithUnknownKey(self) -> None:
        self.assertIn(
            "'checkpoint_delay'", self.refused(self.file('role = "primary"\ncheckpoint_delay = 1\n'))
        )

    def test_fileWithTable(self) -> None:
        self.assertIn("'qemu'", self.refused(self.file("[qemu]\nbinary = 'x'\n")))

    def test_fileNamesNoOtherFile(self) -> None:
        self.assertIn("'config'", self.refused(self.file('role = "primary"\nconfig = "x"\n')))

    def test_helpForAStranger(self) -> None:
        text = str(Options())
        for word in (
            "primary: run the guest",
            "hold: wait for an operator",
            "[default: 20000]",
            "colo status",
        ):
            self.assertIn(word, text)
