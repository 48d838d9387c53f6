//! Converts networking.k8s.io/v1 `ServiceCIDR` (KEP-1880).

use k8s_openapi::api::networking::v1 as networking;

use super::{Converted, FieldError, field};
use crate::state::{Object, ServiceCidr};

pub(super) fn convert(range: &networking::ServiceCIDR) -> Result<Converted, FieldError> {
    let texts = range.spec.as_ref().and_then(|spec| spec.cidrs.as_deref()).unwrap_or_default();
    let cidrs = texts.iter().enumerate();
    let cidrs: Vec<_> = cidrs
        .map(|(index, text)| field::cidr(format_args!("spec.cidrs[{index}]"), text))
        .collect::<Result<_, _>>()?;
    field::one_per_family("spec.cidrs", &cidrs, |cidr| cidr.addr().is_ipv4())?;
    let range =
        ServiceCidr { name: super::name(&range.metadata)?, owner: super::owner(&range.metadata), cidrs };
    Ok(Converted { object: Some(Object::ServiceCidr(range)), problems: Vec::new() })
}
