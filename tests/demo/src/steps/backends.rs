//! Removes a backend under traffic and adds it again: no request fails, and none reaches the
//! backend after its removal took effect.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::super::{
    show::Show,
    testbed::{FAMILIES, Testbed, WEB_PORT},
};
use dataplane_testkit::{
    lab::{Client, failures, wait},
    traffic::{now_us, report::Request},
};

const INTERVAL: Duration = Duration::from_millis(2);
const TIMEOUT: Duration = Duration::from_secs(20);
/// Requests that must be answered after a change.
const REQUESTS: usize = 50;

pub(super) fn all(testbed: &mut Testbed, show: &mut Show) {
    show.check(testbed, "a backend removed and added under traffic", |testbed| {
        let clients = FAMILIES.map(|family| {
            testbed.clients[0].place().keep_getting(testbed.web.at(family, WEB_PORT), INTERVAL)
        });
        let [v4, v6] = clients;
        leave_and_return(testbed, [v4?, v6?])
    });
}

fn leave_and_return(testbed: &mut Testbed, clients: [Client<Vec<Request>>; 2]) -> Result<String> {
    let last = testbed.webs.len() - 1;
    let removed = testbed.webs[last].name().to_owned();
    for client in &clients {
        client.wait(TIMEOUT, |request| request.is_from(&removed)).context("before the removal")?;
    }

    let all = testbed.web.backends.clone();
    testbed.web.backends.truncate(last);
    let removed_after = apply(testbed)?;
    for client in &clients {
        answered_since(client, removed_after)?;
    }
    // requests that began before the removal have ended
    drop(testbed.web_servers[last].take());
    let without_it = now_us()?;
    for client in &clients {
        answered_since(client, without_it)?;
    }

    testbed.web_servers[last] = Some(testbed.webs[last].serve()?);
    testbed.web.backends = all;
    let returned_after = apply(testbed)?;
    for client in &clients {
        let is_back = |request: &Request| request.began_us > returned_after && request.is_from(&removed);
        client.wait(TIMEOUT, is_back).context("after it was added again")?;
    }

    let mut total = 0;
    for client in clients {
        let requests = client.stop()?;
        let failures = failures(&requests);
        ensure!(failures.is_empty(), "requests failed: {failures:?} of {}", requests.len());
        let stray = requests
            .iter()
            .filter(|request| request.began_us > removed_after && request.ended_us < without_it)
            .filter(|request| request.is_from(&removed));
        let stray = stray.count();
        ensure!(stray == 0, "{stray} requests reached {removed} after it was removed");
        total += requests.len();
    }
    Ok(format!("{total} requests, 0 failed; {removed} removed and added again"))
}

/// Applies the web Service. Returns the time after which every agent has written it.
fn apply(testbed: &mut Testbed) -> Result<u64> {
    let web = testbed.web.clone();
    testbed.cluster.apply(&web)?;
    now_us()
}

fn answered_since(client: &Client<Vec<Request>>, moment: u64) -> Result<()> {
    wait::until("requests", TIMEOUT, || {
        let since = client.so_far()?.iter().filter(|request| request.began_us > moment).count();
        Ok((since >= REQUESTS).then_some(()))
    })
}
