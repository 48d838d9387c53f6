//! iperf3 over TCP and UDP. It shows that bulk traffic flows; the benchmark measures how fast the
//! datapath is.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::super::{
    show::Show,
    testbed::{FAMILIES, Testbed},
};
use dataplane_testkit::lab::Family;

/// Bit rate of the UDP client.
const UDP_RATE: &str = "50M";

pub(super) fn all(testbed: &mut Testbed, show: &mut Show) {
    for family in FAMILIES {
        show.check(testbed, &format!("iperf3 TCP, {family}"), |testbed| {
            let result = iperf(testbed, family, &[])?;
            let received = number(&result, "/end/sum_received/bits_per_second")?;
            ensure!(received > 0.0, "nothing was received");
            Ok(format!("{:.2} Gbit/s", received / 1e9))
        });
    }
    for family in FAMILIES {
        show.check(testbed, &format!("iperf3 UDP, {family}"), |testbed| {
            let unread_before = unread(testbed)?;
            let result = iperf(testbed, family, &["--udp", "--bitrate", UDP_RATE])?;
            let packets = number(&result, "/end/sum/packets")?;
            let lost = number(&result, "/end/sum/lost_packets")?;
            // a datagram that the receiver's full socket dropped has crossed the datapath
            let unread = unread(testbed)? - unread_before;
            ensure!(
                packets > 0.0 && lost <= unread,
                "{lost} of {packets} datagrams were lost, {unread} of them at the receiver's socket"
            );
            Ok(format!(
                "{packets} datagrams at {UDP_RATE}bit/s, {} lost in the network",
                (lost - unread).max(0.0)
            ))
        });
    }
}

fn iperf(testbed: &Testbed, family: Family, more: &[&str]) -> Result<Value> {
    let server = testbed.iperf.address(family).to_string();
    let arguments = [&["--client", &server, "--time", "2", "--json"], more].concat();
    let output = testbed.clients[0].place().output("iperf3", &arguments)?;
    let result: Value = serde_json::from_slice(&output.stdout).context("iperf3 printed no JSON")?;
    if let Some(error) = result.get("error") {
        anyhow::bail!("iperf3: {error}");
    }
    Ok(result)
}

/// Number of datagrams that the server's pod dropped because the receive buffer of a socket was
/// full.
fn unread(testbed: &Testbed) -> Result<f64> {
    let namespace = testbed.iperf.place().namespace();
    let v6 = namespace.read_proc("/proc/net/snmp6")?;
    let v6 =
        v6.lines().find_map(|line| line.strip_prefix("Udp6RcvbufErrors")).context("no Udp6RcvbufErrors")?;
    let v6: u32 = v6.trim().parse()?;
    Ok(f64::from(v6) + f64::from(u32::try_from(namespace.snmp("Udp", "RcvbufErrors")?)?))
}

fn number(result: &Value, pointer: &str) -> Result<f64> {
    result.pointer(pointer).and_then(Value::as_f64).with_context(|| format!("iperf3 reported no {pointer}"))
}
