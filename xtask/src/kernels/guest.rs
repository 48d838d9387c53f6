//! A virtual machine in QEMU: boots a kernel with an image, writes its console to a file, and ends
//! after a time limit.

use std::{
    fs::{self, File},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

/// Memory in MiB, which also holds the image.
const MEMORY: &str = "2048";

/// The guest uses QEMU's timer as clock: the host's time stamp counter, if the host is a virtual
/// machine too, can jump by minutes.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 no_timer_check clocksource=hpet tsc=unstable";

/// Boots and waits until the guest powers off. Returns whether it did within the limit.
pub(super) fn run(kernel: &Path, image: &Path, console: &Path, limit: Duration) -> Result<bool> {
    // the kernel kills it when this process ends
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
        // std has no wait with a time limit; a boot takes much longer than half a second
        thread::sleep(Duration::from_millis(500));
    }
}

/// Killed when dropped.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        // fails if the process has ended
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// Hardware virtualisation if the machine has it. Software implementations of KVM (pvm) emulate
/// instructions that kernels run at boot more slowly than QEMU, and not all of them.
fn acceleration() -> [&'static str; 4] {
    let has_hardware =
        ["kvm_intel", "kvm_amd"].iter().any(|module| Path::new("/sys/module").join(module).exists());
    if has_hardware && File::options().read(true).write(true).open("/dev/kvm").is_ok() {
        ["-accel", "kvm", "-cpu", "host"]
    } else {
        ["-accel", "tcg", "-cpu", "max"]
    }
}
