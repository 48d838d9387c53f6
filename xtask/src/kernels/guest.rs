//! A machine in QEMU: boots a kernel with an image, writes its console to a file, and ends in bounded time.

use std::{
    fs::{self, File},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

/// MiB. The image is in there as well.
const MEMORY: &str = "2048";

/// The processor's counter is the host's, which in a virtual machine may leap by minutes: the guest goes by the timer QEMU
/// keeps.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 no_timer_check clocksource=hpet tsc=unstable";

/// Boots, and waits until the guest has switched itself off. Whether it did so in time.
pub(super) fn run(kernel: &Path, image: &Path, console: &Path, limit: Duration) -> Result<bool> {
    // ends with us, however we end
    let mut qemu = Command::new("setpriv");
    qemu.args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64"]);
    qemu.args([
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-smp",
        "1",
        "-m",
        MEMORY,
    ]);
    qemu.args(acceleration());
    qemu.arg("-serial").arg(format!("file:{}", console.display()));
    qemu.arg("-kernel").arg(kernel).arg("-initrd").arg(image);
    qemu.arg("-append").arg(COMMAND_LINE);
    fs::write(console, "").with_context(|| format!("write {}", console.display()))?;
    let errors = console.with_file_name("qemu.log");
    let child = qemu
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(&errors).with_context(|| format!("write {}", errors.display()))?)
        .spawn()
        .context("run setpriv (package util-linux)")?;
    let mut machine = Machine(child);
    let end = Instant::now() + limit;
    loop {
        if let Some(status) = machine.0.try_wait()? {
            anyhow::ensure!(
                status.success(),
                "qemu-system-x86_64: {status}\n{}",
                fs::read_to_string(&errors).unwrap_or_default().trim()
            );
            return Ok(true);
        }
        if Instant::now() >= end {
            return Ok(false);
        }
        // a process that ends is no file to wait for, and half a second is nothing beside a boot
        thread::sleep(Duration::from_millis(500));
    }
}

/// Ends with its owner.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        // ended by itself: then there is nothing to end
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// The processor's own virtualisation if it is there. Software versions of KVM (pvm) emulate what an ordinary kernel does at
/// boot, more slowly than QEMU itself does, and not all of it.
fn acceleration() -> [&'static str; 4] {
    let has_hardware =
        ["kvm_intel", "kvm_amd"].iter().any(|module| Path::new("/sys/module").join(module).exists());
    if has_hardware && File::options().read(true).write(true).open("/dev/kvm").is_ok() {
        ["-accel", "kvm", "-cpu", "host"]
    } else {
        ["-accel", "tcg", "-cpu", "max"]
    }
}
