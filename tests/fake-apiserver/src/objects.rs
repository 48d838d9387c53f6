//! A blocking client for the objects of an API server, this one or a real one. It runs on its own
//! thread, which may be in another network namespace.

use std::{
    fs::File,
    sync::{Arc, mpsc},
    thread,
};

use anyhow::{Context as _, Result, anyhow, bail};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use kube::{
    Client, Config,
    api::{Api, ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};
use tokio::sync::mpsc as queue;

use super::{namespace, resources::Resource};

/// Concurrent requests of [`Objects::apply_many`].
const CONCURRENT_REQUESTS: usize = 16;

type Task = Box<dyn FnOnce(Client) -> futures::future::BoxFuture<'static, ()> + Send>;

/// A blocking client for objects of an API server.
#[derive(Clone, Debug)]
pub struct Objects {
    tasks: queue::UnboundedSender<Task>,
}

impl Objects {
    /// Connects as the kubeconfig's user, from this network namespace or the caller's.
    pub fn connect(kubeconfig: &str, namespace: Option<Arc<File>>) -> Result<Self> {
        let text = kubeconfig.to_owned();
        let (tasks, mut queue) = queue::unbounded_channel::<Task>();
        let (report, ready) = mpsc::channel();
        thread::Builder::new().name("apiserver-client".to_owned()).spawn(move || {
            let mut serve = || -> Result<()> {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                runtime.block_on(async {
                    let config = Kubeconfig::from_yaml(&text)?;
                    let config =
                        Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?;
                    let client = Client::try_from(config)?;
                    let _gone = report.send(Ok(()));
                    while let Some(task) = queue.recv().await {
                        task(client.clone()).await;
                    }
                    Ok(())
                })
            };
            let served =
                namespace.map_or(Ok(()), |namespace| namespace::enter(&namespace)).and_then(|()| serve());
            // the receiver is dropped after a successful start
            let _gone = report.send(served);
        })?;
        ready
            .recv()
            .map_err(|_ended| anyhow!("the client thread ended"))?
            .context("cannot create a client")?;
        Ok(Self { tasks })
    }

    /// Runs an async function with the client on its thread and waits for the result.
    pub fn with<T, F>(&self, task: impl FnOnce(Client) -> F + Send + 'static) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let (report, done) = mpsc::channel();
        let task: Task = Box::new(move |client| {
            Box::pin(async move {
                let _gone = report.send(task(client).await);
            })
        });
        self.tasks.send(task).map_err(|_ended| anyhow!("the client has ended"))?;
        done.recv().map_err(|_ended| anyhow!("the client has ended"))
    }

    /// Creates or replaces the objects, and their status where the kind has a status subresource.
    pub fn apply(&self, objects: &[Value]) -> Result<()> {
        for object in objects {
            let object = without_server_fields(object);
            let what = describe(&object);
            self.with(move |client| async move { apply(client, &object).await })?
                .with_context(|| format!("apply {what}"))?;
        }
        Ok(())
    }

    /// Like [`Self::apply`], concurrently and in no order.
    pub fn apply_many(&self, objects: &[Value]) -> Result<()> {
        let objects: Vec<Value> = objects.iter().map(without_server_fields).collect();
        self.with(move |client| async move {
            let all = stream::iter(objects.into_iter().map(|object| {
                let client = client.clone();
                async move {
                    let what = describe(&object);
                    apply(client, &object).await.with_context(|| format!("apply {what}"))
                }
            }));
            all.buffer_unordered(CONCURRENT_REQUESTS).try_collect::<()>().await
        })?
    }

    /// Creates an object. Returns it as stored.
    pub fn create(&self, object: &Value) -> Result<Value> {
        let object = without_server_fields(object);
        let what = describe(&object);
        let created = self.with(move |client| async move {
            let (api, object) = api(client, &object)?;
            anyhow::Ok(serde_json::to_value(api.create(&PostParams::default(), &object).await?)?)
        })?;
        created.with_context(|| format!("create {what}"))
    }

    /// Deletes the objects without a grace period; missing objects are no error.
    pub fn delete(&self, objects: &[Value]) -> Result<()> {
        for object in objects {
            let object = object.clone();
            let what = describe(&object);
            let deleted = self.with(move |client| async move {
                let (api, named) = api(client, &object)?;
                let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
                match api.delete(&named.metadata.name.unwrap_or_default(), &now).await {
                    Ok(_) => Ok(()),
                    Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
                    Err(error) => Err(anyhow!(error)),
                }
            })?;
            deleted.with_context(|| format!("delete {what}"))?;
        }
        Ok(())
    }

    /// Merges `change` (`{"status": ...}`) into the status of an object.
    pub fn patch_status(&self, object: &Value, change: &Value) -> Result<()> {
        let (object, change) = (object.clone(), change.clone());
        let what = describe(&object);
        let patched = self.with(move |client| async move {
            let (api, named) = api(client, &object)?;
            let name = named.metadata.name.unwrap_or_default();
            api.patch_status(&name, &PatchParams::default(), &Patch::Merge(&change)).await?;
            anyhow::Ok(())
        })?;
        patched.with_context(|| format!("patch the status of {what}"))
    }

    /// Merges `change` into an object.
    pub fn patch(&self, object: &Value, change: &Value) -> Result<()> {
        let (object, change) = (object.clone(), change.clone());
        let what = describe(&object);
        let patched = self.with(move |client| async move {
            let (api, named) = api(client, &object)?;
            let name = named.metadata.name.unwrap_or_default();
            api.patch(&name, &PatchParams::default(), &Patch::Merge(&change)).await?;
            anyhow::Ok(())
        })?;
        patched.with_context(|| format!("patch {what}"))
    }

    /// Returns an object, or `None` if it does not exist.
    pub fn get(&self, api_version: &str, kind: &str, namespace: &str, name: &str) -> Result<Option<Value>> {
        let object = json!({
            "apiVersion": api_version, "kind": kind, "metadata": {"namespace": namespace, "name": name},
        });
        let what = describe(&object);
        let found = self.with(move |client| async move {
            let (api, named) = api(client, &object)?;
            let found = api.get_opt(&named.metadata.name.unwrap_or_default()).await?;
            anyhow::Ok(found.map(serde_json::to_value).transpose()?)
        })?;
        found.with_context(|| format!("get {what}"))
    }

    /// Returns all objects of a kind in a namespace; empty: in all namespaces.
    pub fn list(&self, api_version: &str, kind: &str, namespace: &str) -> Result<Vec<Value>> {
        let object = json!({
            "apiVersion": api_version, "kind": kind, "metadata": {"namespace": namespace, "name": ""},
        });
        let listed = self.with(move |client| async move {
            let (api, _) = api(client, &object)?;
            let list = api.list(&ListParams::default()).await?;
            let items = list.items.into_iter().map(serde_json::to_value);
            anyhow::Ok(items.collect::<serde_json::Result<Vec<Value>>>()?)
        })?;
        listed.with_context(|| format!("list {kind}"))
    }
}

async fn apply(client: Client, object: &Value) -> Result<()> {
    let (api, mut wanted) = api(client, object)?;
    let name = wanted.metadata.name.clone().unwrap_or_default();
    let kept = match api.get_opt(&name).await? {
        None => api.create(&PostParams::default(), &wanted).await?,
        Some(old) => {
            wanted.metadata.resource_version = old.metadata.resource_version;
            api.replace(&name, &PostParams::default(), &wanted).await?
        }
    };
    let status =
        object.get("status").filter(|status| status.as_object().is_some_and(|fields| !fields.is_empty()));
    let Some(status) = status else { return Ok(()) };
    if kept.data.get("status") == Some(status) || !resource(object)?.status {
        return Ok(());
    }
    // replaced, not merged: absent fields are removed
    let mut wanted = kept;
    wanted.data["status"] = status.clone();
    api.replace_status(&name, &PostParams::default(), &wanted).await?;
    Ok(())
}

fn api(client: Client, object: &Value) -> Result<(Api<DynamicObject>, DynamicObject)> {
    let resource = resource(object)?;
    let kind = ApiResource {
        group: resource.group.to_owned(),
        version: resource.version.to_owned(),
        api_version: resource.api_version(),
        kind: resource.kind.to_owned(),
        plural: resource.plural.to_owned(),
    };
    let object: DynamicObject = serde_json::from_value(object.clone())?;
    let namespace = object.metadata.namespace.as_deref().filter(|namespace| !namespace.is_empty());
    let api = match namespace {
        Some(namespace) if resource.namespaced => Api::namespaced_with(client, namespace, &kind),
        _ => Api::all_with(client, &kind),
    };
    Ok((api, object))
}

fn resource(object: &Value) -> Result<&'static Resource> {
    match Resource::of(object) {
        Some(resource) => Ok(resource),
        None => bail!("unknown kind: {} {}", object["apiVersion"], object["kind"]),
    }
}

/// Returns the object without the fields that only a server writes.
fn without_server_fields(object: &Value) -> Value {
    let mut object = object.clone();
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        for field in ["uid", "resourceVersion", "creationTimestamp"] {
            metadata.remove(field);
        }
    }
    object
}

fn describe(object: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let metadata = &object["metadata"];
    format!("{} {}/{}", text(&object["kind"]), text(&metadata["namespace"]), text(&metadata["name"]))
}
